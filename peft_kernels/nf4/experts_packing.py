"""NF4Experts: an experts module of transformers 5 with 4-bit weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.module_calls import class_forward
from .experts_forward import experts_forward, weight_names
from .loading import load_layer
from .model import ModelLink
from .sharded import accelerate_loading
from .sharded.checks import is_sharded, is_tensor_parallel
from .weight import PackedWeight

_HOME = "transformers.integrations.moe"


def is_experts(module: nn.Module) -> bool:
    """Whether `pack` supports a module: experts of transformers with ordinary parameters."""
    if isinstance(module, NF4Experts) or not computes_experts(module):
        return False
    weights = [module._parameters.get(name) for name in weight_names(module)]
    return all(type(weight) is nn.Parameter and weight.dim() == 3 for weight in weights)


def computes_experts(module: nn.Module) -> bool:
    """Whether a module has transformers' own experts forward, which `experts_implementation` selects."""
    home = getattr(class_forward(type(module)), "__globals__", {}).get("__name__")
    return home == _HOME and hasattr(module, "is_transposed")


def packed_weights(module: nn.Module) -> list[str]:
    """Names of a module's packed parameters."""
    found = module._parameters.items()
    return [
        name
        for name, weight in found
        if (isinstance(weight, PackedWeight) and not weight.is_dense) or is_tensor_parallel(weight)
    ]


class NF4Experts(accelerate_loading.ReceivesWeights):
    """Mixin for the class of a packed experts module.

    Weights are (experts, out_features, in_features), also if the original module has them transposed
    (GPT-OSS); `is_transposed` is then False, for PEFT too. Otherwise like `nn.NF4Linear`: a merge makes
    weights dense, unmerging restores the 4 bits, and `merge_and_unload` leaves a module of the original
    class. The `state_dict` uses our own format, since bitsandbytes has none; dense weights keep their layout
    in it.

    Attributes
    ----------
    compute_dtype : torch.dtype, optional
        Dtype to which fp32 activations are rounded. None: the weights' nominal dtype.
    plain_class : type
        The original class of the module.
    """

    plain_class: ClassVar[type[nn.Module]]
    compute_dtype: torch.dtype | None = None
    link: ModelLink | None = None
    stored_transposed: bool
    stacks: dict[str, Any] | None = None
    """How weights lie in an owner's file, `owners.stacked.Stacked`, if it has layers for each expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def revert_to_linear_if_dense(self: Any) -> nn.Module:
        """Reverts to an ordinary module of `plain_class` if all weights are dense. Returns the module."""
        if all(_dense(weight) is not None for weight in _weights(self).values()):
            unpack(self)
        module: nn.Module = self
        return module

    def named_modules(
        self: Any, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.NF4Linear.named_modules`: reverts a merged module that PEFT has unwrapped."""
        if memo is None and self.link is not None and self.link.holds(self):
            self.revert_to_linear_if_dense()
        return nn.Module.named_modules(self, memo, prefix, remove_duplicate)

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, weight in _weights(self).items():
            dense = _dense(weight)
            if accelerate_loading.is_awaited(weight):
                del destination[prefix + name]
            elif is_sharded(weight):
                continue
            elif dense is None:
                del destination[prefix + name]
                destination.update(weight.state_dict(prefix, name))
            else:
                destination[prefix + name] = _transposed(self, dense)

    def _load_from_state_dict(self: Any, *args: Any) -> None:
        load_rest: Any = super()._load_from_state_dict  # type: ignore[misc]
        load_layer(self, _weights(self), functools.partial(_transposed, self), load_rest, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        plain = type(self).plain_class
        if type(self) is not _class_for(plain):  # a subclass made by another library
            return reduced
        _function, _arguments, *state = reduced
        return _new, (plain,), *state

    def extra_repr(self) -> str:
        weights = _weights(self)
        forms = ", ".join(f"{name}={tuple(weight.shape)}" for name, weight in weights.items())
        some = next((weight for weight in weights.values() if isinstance(weight, PackedWeight)), None)
        return forms if some is None else f"{forms}, {some._state.form}, dtype={some.dtype}"


def pack(
    module: Any,
    blocksize: int | None = None,
    double_quant: bool = True,
    name: str = "experts",
    compute_dtype: torch.dtype | None = None,
    format: str = "nf4",
) -> None:
    """Quantises the weights of an experts module in place, one at a time. Raises as
    `PackedWeight.quantize`."""
    for key in weight_names(module):
        dense = _transposed(module, module._parameters[key].detach(), module.is_transposed)
        weight = PackedWeight.quantize(dense, blocksize, double_quant, name=f"{name}.{key}", format=format)
        module._parameters[key] = nn.Parameter(weight, requires_grad=False)
    adopt(module, compute_dtype)


def adopt(module: Any, compute_dtype: torch.dtype | None = None) -> None:
    """Turns a module that already holds NF4 weights (experts, out, in) into NF4Experts. Ordinary parameters
    stay dense and are transposed to that layout."""
    for weight in _weights(module).values():
        if not isinstance(weight, PackedWeight) and module.is_transposed:
            weight.data = _transposed(module, weight.data, True)
    module.__class__ = _class_for(type(module))
    module.stored_transposed, module.is_transposed = module.is_transposed, False
    module.compute_dtype = compute_dtype


def unpack(module: Any, dtype: torch.dtype | None = None) -> None:
    """Undoes `pack`: restores the original class with dense weights of `dtype`, by default the nominal
    one."""
    for name, weight in _weights(module).items():
        dense = _dense(weight)
        dense = weight.dequantize(dtype) if dense is None else dense.to(dtype or weight.dtype)
        requires_grad = weight.requires_grad
        module._parameters[name] = nn.Parameter(_transposed(module, dense), requires_grad=requires_grad)
    link, module.is_transposed = module.link, module.stored_transposed
    for attribute in ("compute_dtype", "link", "stored_transposed", "stacks"):
        module.__dict__.pop(attribute, None)
    module.__class__ = type(module).plain_class
    if link is not None:
        link.layer_gone()


def _weights(module: Any) -> dict[str, Any]:
    """The weights: PackedWeights, dense after a merge, or ordinary parameters if the checkpoint has them
    dense."""
    return {name: module._parameters[name] for name in weight_names(module)}


def _dense(weight: Tensor) -> Tensor | None:
    if is_sharded(weight):
        return None
    return weight.dense if isinstance(weight, PackedWeight) else weight.data


def _transposed(module: Any, weight: Tensor, transposed: bool | None = None) -> Tensor:
    """Converts between the layout of the module in transformers and (experts, out, in)."""
    transposed = module.stored_transposed if transposed is None else transposed
    return weight.mT.contiguous() if transposed else weight


_classes: dict[type, type] = {}


def _class_for(plain: type[nn.Module]) -> type:
    """The cached subclass of NF4Experts and `plain`."""
    if plain not in _classes:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        bases = (NF4Experts, plain)
        _classes[plain] = type(plain.__name__, bases, names | {"plain_class": plain})
    return _classes[plain]


def _new(plain: type[nn.Module]) -> Any:
    cls: Any = _class_for(plain)
    return cls.__new__(cls)
