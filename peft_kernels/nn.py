"""Modules: NF4Linear, LoRALinear, NF4LoRALinear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .functional import dora_linear, lora_linear, nf4_linear
from .nf4 import NF4Weight

__all__ = ["LoRALinear", "NF4Linear", "NF4LoRALinear"]


class NF4Linear(nn.Linear):
    """A frozen `nn.Linear` whose weight is an `NF4Weight`.

    Everything that knows nn.Linear knows it: `peft.get_peft_model` injects LoRA, `model.to()` moves it,
    deepcopy and pickle copy it. `state_dict` holds bitsandbytes' keys and loads from a checkpoint of either
    side. A merge into it leaves a dense weight (in the dtype that the layer had), and the layer is then an
    ordinary nn.Linear.
    """

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a dense weight first
        self.out_features, self.in_features = weight._state.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True, name: str = "weight"
    ) -> NF4Linear:
        """Quantise an nn.Linear (or requantise one that a merge made dense).

        `linear` itself is left alone; the bias is shared with it. Errors as `NF4Weight.quantize`.
        """
        new = cls(NF4Weight.quantize(linear.weight.detach(), blocksize, double_quant, name=name))
        new.register_parameter("bias", linear.bias)
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not isinstance(weight, NF4Weight):
            return nn.functional.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return nf4_linear(x, weight, bias)

    def settle(self) -> None:
        """Become an nn.Linear if a merge has made the weight dense. Happens by itself when `weight` is looked
        at."""
        self.__getattr__("weight")

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "weight" and isinstance(value, NF4Weight) and value.is_dense:
            # A merge has made the weight dense: it is nothing special any more, and neither is the layer.
            assert value.dense is not None
            value = nn.Parameter(value.dense, requires_grad=False)
            self._parameters["weight"] = value
            self.__class__ = nn.Linear  # type: ignore[assignment]
        return value

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if isinstance(self.weight, NF4Weight):
            destination.update(self.weight.state_dict(prefix))
        else:
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        mine = [k for k in state_dict if k == key or k.startswith(key + ".")]
        new = None
        if not mine:
            missing_keys.append(key)
        else:
            try:
                new = NF4Weight.from_state_dict(state_dict, prefix)
                if new._state.shape != (self.out_features, self.in_features):
                    expected = (self.out_features, self.in_features)
                    raise ValueError(f"{key}: expected shape {expected}, got {new._state.shape}")
            except ValueError as error:
                error_msgs.append(str(error))
                return  # the bias stays too: half a layer is worse than none
        rest = {k: v for k, v in state_dict.items() if k not in mine}
        weight = self._parameters.pop("weight")
        errors = len(error_msgs)
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters["weight"] = weight
        if new is not None and len(error_msgs) == errors:
            with torch.no_grad():
                # Not copy_: the nominal dtype is part of what was saved.
                self.weight.data = new.to(self.weight.device, copy=True)

    def extra_repr(self) -> str:
        weight = self.weight
        form = (
            f", blocksize={weight.blocksize}, dtype={weight.dtype}" if isinstance(weight, NF4Weight) else ""
        )
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
        Type of the adapter, fp32 by default; products never copy the activations to it.
    lora_dropout : float
        Probability of dropping an input of A in training.
    use_dora : bool
        Learn the magnitudes of the rows too (DoRA, Liu et al. 2024); see `functional.dora_linear`.
    """

    lora_magnitude_vector: nn.Parameter | None

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
        """A as nn.Linear starts, B zero, magnitudes the norms of the rows: the layer starts as its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._weight().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        base, weight = self.base_layer, self.base_layer.weight
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            if not isinstance(weight, NF4Weight):
                weight = weight.to(x.dtype)
        bias = base.bias if base.bias is None else base.bias.to(x.dtype)
        dropout_p = self.lora_dropout if self.training else 0.0
        adapter, magnitude = (self.lora_A, self.lora_B), self.lora_magnitude_vector
        if magnitude is not None:
            return dora_linear(x, weight, *adapter, magnitude, self.scaling, bias, dropout_p)
        return lora_linear(x, weight, *adapter, self.scaling, bias, dropout_p)

    def _weight(self) -> Tensor:
        """The base weight in fp32."""
        weight = self.base_layer.weight
        return weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()

    def delta_weight(self) -> Tensor:
        """`scaling * B A`, (out_features, in_features), in the adapter's dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new dense nn.Linear with the update in its weight, in the base's dtype. Changes nothing here."""
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
        if isinstance(base_layer, nn.Linear) and not isinstance(base_layer.weight, NF4Weight):
            base_layer = NF4Linear.from_linear(base_layer, blocksize, double_quant)
        super().__init__(base_layer, r, lora_alpha, use_rslora, dtype, lora_dropout, use_dora)
