"""Modules: NF4Linear, LoRALinear, NF4LoRALinear."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .core.packed_state import PARALLEL
from .core.wrong_types import refuses_wrong_types
from .nf4 import loading
from .nf4.model import ModelLink
from .nf4.sharded import accelerate_loading
from .nf4.sharded.checks import UNGATHERED, is_dtensor, is_sharded, is_tensor_parallel
from .nf4.weight import PackedWeight
from .ops.arguments import autocast_dtype
from .ops.linear import nf4_linear
from .ops.lora.dora import dora_linear
from .ops.lora.lora import lora_linear

__all__ = ["LoRALinear", "NF4Linear", "NF4LoRALinear"]


class NF4Linear(accelerate_loading.ReceivesWeights, nn.Linear):
    """A frozen `nn.Linear` whose weight is an `PackedWeight`.

    It works with code for nn.Linear: `peft.get_peft_model` injects LoRA, and `model.to()`, deepcopy and
    pickle work. `state_dict` uses bitsandbytes' keys; checkpoints are interchangeable.

    A merge leaves a dense weight in the original dtype, unmerging restores the 4 bits. When
    `merge_and_unload` unwraps a layer with a dense weight, or a dense `weight` is assigned, the layer becomes
    an ordinary one of `plain_class`.

    Attributes
    ----------
    compute_dtype : torch.dtype, optional
        Dtype to which fp32 activations are rounded for the matmul, as in bitsandbytes' Linear4bit. None: the
        weight's nominal dtype, which kbit preparation keeps and `float()` and `half()` change. Other
        activations are used in their own dtype, or in autocast's.
    plain_class : type
        The class that was quantised: nn.Linear, or FalconLinear or Conv1D of transformers. Conv1D stores its
        weight as (in_features, out_features).
    """

    compute_dtype: torch.dtype | None = None
    plain_class: type[nn.Module] = nn.Linear
    link: ModelLink | None = None  # to the quantised model
    aside: dict[str, Tensor] | None = None
    """Tensors of another owner's checkpoint that only saving needs, see `nf4.owners`."""
    whole_scales: tuple[Tensor, Tensor] | None = None
    """Second-level scales and mean of the whole weight, on the CPU, if this process holds a slice of it."""
    _hf_quantized_needs_local_tp = True
    """Makes transformers' tensor parallelism call the forward with local tensors."""

    @refuses_wrong_types
    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a dense weight
        self.out_features, self.in_features = weight._state.shape
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)

    @classmethod
    @refuses_wrong_types
    def from_linear(
        cls,
        linear: nn.Module,
        blocksize: int | None = None,
        double_quant: bool = True,
        name: str = "weight",
        compute_dtype: torch.dtype | None = None,
        format: str = "nf4",
    ) -> NF4Linear:
        """Quantises an nn.Linear (also an NF4Linear made dense by a merge) or a Conv1D of transformers.

        `linear` is not changed; its bias is shared. On the meta device the layer is empty. Errors as
        `PackedWeight.quantize`.
        """
        dense: Any = linear.weight.detach()  # type: ignore[operator]
        if not isinstance(linear, nn.Linear):
            dense = dense.t()
        weight = PackedWeight.quantize(dense, blocksize, double_quant, name=name, format=format)
        new = cls(weight, compute_dtype=compute_dtype)
        new.register_parameter("bias", linear.bias)
        if not isinstance(linear, NF4Linear) and type(linear) is not nn.Linear:
            new.plain_class = type(linear)
        elif isinstance(linear, NF4Linear):
            new.plain_class, new.link = linear.plain_class, linear.link
        return new.train(linear.training)

    @classmethod
    def awaiting(cls, linear: nn.Module, compute_dtype: torch.dtype | None = None) -> NF4Linear:
        """A placeholder on the meta device until its weight is assigned.

        Assigning a PackedWeight completes it; assigning a dense weight (out_features, in_features) turns it
        into an ordinary layer of `linear`'s class."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        weight: Any = linear.weight
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        new.out_features, new.in_features = weight.shape
        new.compute_dtype, new.plain_class = compute_dtype, type(linear)
        new.weight = nn.Parameter(weight.detach(), requires_grad=False)
        new.register_parameter("bias", linear.bias)
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not isinstance(weight, PackedWeight):
            if is_sharded(weight):
                raise RuntimeError(f"weight: {UNGATHERED}")
            if is_tensor_parallel(weight):
                name = weight._local_tensor._state.name
                raise RuntimeError(f"{name}: {PARALLEL}, expected calls of the layer, hooks and all")
            return nn.functional.linear(x, weight, bias)
        compute_dtype, autocast = None, autocast_dtype(x.device.type)
        if autocast is not None:
            x = x.to(autocast)
        elif x.dtype == torch.float32:
            compute_dtype = self.compute_dtype or weight.dtype
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return nf4_linear(x, weight, bias, compute_dtype)

    def revert_to_linear_if_dense(self) -> nn.Module:
        """Reverts to an ordinary layer of `plain_class` if the weight is dense. Returns the layer."""
        weight = self._parameters["weight"]
        if isinstance(weight, PackedWeight) and weight.dense is not None:
            self.weight = weight
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """PEFT's `merge_and_unload` calls this on each unwrapped layer, which is where a merged one
        reverts."""
        weight = self._parameters["weight"]
        dense = isinstance(weight, PackedWeight) and weight.is_dense
        if memo is None and dense and self.link is not None and self.link.holds(self):
            self.revert_to_linear_if_dense()
        return nn.Module.named_modules(self, memo, prefix, remove_duplicate)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or "weight" not in self.__dict__["_parameters"]:
            return super().__setattr__(name, value)
        if is_sharded(value) or is_tensor_parallel(value):
            return super().__setattr__(name, value)
        if isinstance(value, PackedWeight):
            if value.dense is None:
                return super().__setattr__(name, value)
            value = nn.Parameter(value.dense, requires_grad=False)
        elif is_dtensor(value):
            raise ValueError(self._not_sharded(value))
        plain, link = self.plain_class, self.link
        for attribute in ("compute_dtype", "plain_class", "link", "aside"):
            self.__dict__.pop(attribute, None)
        self.__class__ = plain  # type: ignore[assignment]
        if not issubclass(plain, nn.Linear):
            self.nf, self.nx = self.__dict__.pop("out_features"), self.__dict__.pop("in_features")
            turned = nn.Parameter(value.t().contiguous(), requires_grad=value.requires_grad)
            # Notes on the parameter, such as transformers' that it is loaded and not to be initialised.
            turned.__dict__.update(value.__dict__)
            value = turned
        self.weight = value
        if link is not None:
            link.layer_gone()
        return None

    def _not_sharded(self, value: Any) -> str:
        """Error message for a weight that became a DTensor of dense values."""
        state = getattr(self._parameters["weight"], "_state", None)
        if state is None or state.dense is None:
            return (
                f"{'weight' if state is None else state.name}: expected an NF4 weight sharded by rows "
                f"(Shard(0)), got {value.placements} of dense values"
            )
        return (
            f"{state.name}: expected packed NF4 to shard, got a weight that a write made dense: unmerge the "
            "adapter, or pack it (requantize_()), or make the layer an ordinary one "
            "(revert_to_linear_if_dense()), then shard"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if isinstance(self.weight, PackedWeight) and self.weight.dense is not None:
            destination[prefix + "weight"] = self._transposed(self.weight.dense)
        elif isinstance(self.weight, PackedWeight):
            destination.update(self.weight.state_dict(prefix))
        elif is_tensor_parallel(self.weight) and not keep_vars:
            # Gathering the DTensor would gather dense values.
            destination[prefix + "weight"] = self.weight._local_tensor
        elif is_dtensor(self.weight) and self.weight.is_meta and not is_sharded(self.weight):
            # A placeholder: its slice is taken from the whole weight once that is packed.
            shape, dtype = self.weight.shape, self.weight.dtype
            destination[prefix + "weight"] = torch.empty(shape, dtype=dtype, device="meta")
        elif not accelerate_loading.is_awaited(self.weight):
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _transposed(self, values: Tensor) -> Tensor:
        """Converts dense values between (out_features, in_features) and the layout of `plain_class`."""
        return values if issubclass(self.plain_class, nn.Linear) else values.t().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key, load_rest = prefix + "weight", super()._load_from_state_dict
        if is_dtensor(state_dict.get(key)):
            load_rest(state_dict, prefix, *rest)
        elif is_tensor_parallel(self.weight) and any(k == key or k.startswith(f"{key}.") for k in state_dict):
            *_, error_msgs = rest
            error_msgs.append(f"{key}: {PARALLEL}, expected no tensor of it: load by from_pretrained")
        else:
            weights: dict[str, Any] = {"weight": self.weight}
            loading.load_layer(self, weights, self._transposed, load_rest, state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        weight = self.weight
        form = ""
        if isinstance(weight, PackedWeight):
            form = f", {weight._state.form}, dtype={weight.dtype}"
            if self.compute_dtype is not None:
                form += f", compute_dtype={self.compute_dtype}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{form}"


class LoRALinear(nn.Module):
    """A frozen base layer and one LoRA adapter, fused: `x W^T + bias + (alpha / r) (drop(x) A^T) B^T`.

    Parameters
    ----------
    base_layer : nn.Linear
        Dense or NF4Linear; frozen, and kept as a submodule.
    r : int
        Rank of the update.
    lora_alpha : float
        Scale of the update: alpha / r, or alpha / sqrt(r) with `use_rslora`.
    use_rslora : bool
        Rank-stabilised scaling (Kalajdzievski 2023).
    dtype : torch.dtype
        Dtype of the adapter, fp32 by default; activations are not cast to it.
    lora_dropout : float
        Probability of dropping an input of A in training.
    use_dora : bool
        Train the magnitudes of the rows too (DoRA, Liu et al. 2024), see `dora_linear`.
    """

    lora_magnitude_vector: nn.Parameter | None

    @refuses_wrong_types
    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise ValueError(
                f"base_layer: expected an nn.Linear or NF4Linear, got {type(base_layer).__name__}"
            )
        if r <= 0:
            raise ValueError(f"r: expected a positive integer, got {r}")
        if not 0 <= lora_dropout <= 1:
            raise ValueError(f"lora_dropout: expected 0 to 1, got {lora_dropout}")
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.scaling = r, lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(base_layer.out_features, r, dtype=dtype, device=device))
        magnitude = torch.empty(base_layer.out_features, dtype=dtype, device=device) if use_dora else None
        self.register_parameter(
            "lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises A like nn.Linear, B to zero and magnitudes to the norms of the rows: a no-op
        adapter."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._weight().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        base, weight = self.base_layer, self.base_layer.weight
        adapter: tuple[Tensor, Tensor] = (self.lora_A, self.lora_B)
        compute_dtype, autocast = None, autocast_dtype(x.device.type)
        if autocast is not None:
            x = x.to(autocast)
            adapter = (self.lora_A.to(autocast), self.lora_B.to(autocast))
            if not isinstance(weight, PackedWeight):
                weight = weight.to(autocast)
        elif x.dtype == torch.float32:
            compute_dtype = getattr(base, "compute_dtype", None) or weight.dtype
        bias = base.bias if base.bias is None else base.bias.to(x.dtype)
        dropout_p = self.lora_dropout if self.training else 0.0
        magnitude = self.lora_magnitude_vector
        if magnitude is not None:
            return dora_linear(x, weight, *adapter, magnitude, self.scaling, bias, dropout_p, compute_dtype)
        return lora_linear(x, weight, *adapter, self.scaling, bias, dropout_p, compute_dtype)

    def _weight(self) -> Tensor:
        """The base weight in fp32."""
        weight = self.base_layer.weight
        return weight.dequantize(torch.float32) if isinstance(weight, PackedWeight) else weight.float()

    def delta_weight(self) -> Tensor:
        """`scaling * B A`, (out_features, in_features), in the adapter's dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new dense nn.Linear with the update merged, in the base's dtype. This layer is not changed."""
        base = self.base_layer
        weight = self._weight() + self.delta_weight().float()
        if self.lora_magnitude_vector is not None:
            weight *= (self.lora_magnitude_vector.float() / weight.norm(dim=1))[:, None]
        merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        merged.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        merged.bias = base.bias
        return merged.train(self.training)

    def extra_repr(self) -> str:
        more = f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return f"r={self.r}, scaling={self.scaling:g}{more}"


class NF4LoRALinear(LoRALinear):
    """LoRALinear on an NF4 base: QLoRA. A dense `base_layer` is quantised first."""

    @refuses_wrong_types
    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        if isinstance(base_layer, nn.Linear) and not isinstance(base_layer.weight, PackedWeight):
            base_layer = NF4Linear.from_linear(base_layer, blocksize, double_quant)
        super().__init__(base_layer, r, lora_alpha, use_rslora, dtype, lora_dropout, use_dora)
