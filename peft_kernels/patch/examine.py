"""Finds the modules of a model that have a fused forward. Each is examined once, for all kinds of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from ..core.module_calls import is_compiled_by_jit
from ..nf4.experts_packing import NF4Experts
from .block import attention, decoder_layer, gated_mlp, rms_norm
from .experts.forward import FusedParameters
from .lora.forward import FusedLora, lora_reason
from .lora.linear4bit import FusedLinear4bit
from .loss import forward as loss_forward
from .prefix import forward as prefix_forward
from .rules import experts
from .rules.examination import Examination, Layers
from .rules.linear4bit import is_linear4bit
from .rules.linear_kind import is_packed, layer_reason, linear_kind, unsupported_reason
from .rules.lora import is_lora, of_class
from .rules.loss import heads

LAYER, MLP, NORM, ATTENTION, DECODER_LAYER = "layer", "gated MLP", "norm", "attention", "decoder layer"
LOSS, PREFIX = "loss without logits", "PEFT prefix tuning"
PARTS = {
    "layers": LAYER, "mlp": MLP, "qkv": ATTENTION, "attention": ATTENTION, "norms": NORM,
    "residuals": DECODER_LAYER, "loss": LOSS, "prefix": PREFIX,
}  # fmt: skip
"""Parts that `patch` can leave out, and the family of each. A family is left out with all its parts."""


class _Layers(dict[nn.Module, Examination | None]):
    """Examines layers on demand, each once."""

    def __missing__(self, module: nn.Module) -> Examination | None:
        found = self[module] = examine_layer(module)
        return found


def examine_layer(module: nn.Module) -> Examination | None:
    """Examines a linear layer or experts. None for any other module."""
    name = type(module).__name__
    if isinstance(module, nn.Linear) and is_packed(module):
        return Examination("NF4Linear", None, "" if linear_kind(module) else unsupported_reason(module))
    if isinstance(module, NF4Experts):
        return Examination(f"NF4 {name}", None, experts.packed_reason(module))
    if experts.is_wrapper(module):
        return _examine_wrappers(list(experts.nest(module)))
    if is_lora(module):
        base: Any = module.get_base_layer()  # type: ignore[operator]
        _, never, tried = of_class(module, FusedLora)
        kind = f"PEFT LoRA {name} on {type(base).__name__}{' (tried)' if tried else ''}"
        return Examination(kind, None if never else FusedLora, never or lora_reason(module))
    if is_linear4bit(module):
        known = bool(linear_kind(module))
        reason = (
            layer_reason(module)
            if known
            else "a subclass with its own forward, or an unknown version; nothing to do"
        )
        return Examination(f"bitsandbytes {name}", FusedLinear4bit if known else None, reason)
    return None


def _examine_wrappers(wrappers: list[Any]) -> Examination:
    base = experts.wrapped(wrappers)
    names = ", ".join(wrapper.parameter_name for wrapper in reversed(wrappers))
    never = experts.never_reason(base)
    reason = never or experts.wrappers_reason(wrappers, None, FusedParameters)
    kind = f"PEFT LoRA on {names} of {type(base).__name__}"
    return Examination(kind, None if never else FusedParameters, reason)


_EXAMINERS: dict[str, Callable[[nn.Module, Layers], Examination | None]] = {
    LAYER: lambda module, layers: layers[module],
    MLP: gated_mlp.examine,
    NORM: rms_norm.examine,
    DECODER_LAYER: decoder_layer.examine,
    LOSS: loss_forward.examine,
    PREFIX: prefix_forward.examine,
}


def examine(
    module: nn.Module, family: str, layers: Layers | None = None, without: Collection[str] = ()
) -> Examination | None:
    """Examines a module for one family of fused forwards. None if it is not of that family."""
    if is_compiled_by_jit(module):
        return None
    layers = _Layers() if layers is None else layers
    if family == ATTENTION:
        return attention.examine(module, layers, without)
    return _EXAMINERS[family](module, layers)


def layers(model: nn.Module, known: Layers | None = None) -> Iterator[tuple[str, nn.Module, Examination]]:
    """The layers of a model. Wrappers around one module are one layer, the outermost."""
    inner: set[nn.Module] = set()
    known = _Layers() if known is None else known
    for name, module in model.named_modules():
        if module not in inner:
            found = known[module]
            inner.update(experts.nest(module))
            if found is not None:
                yield name, module, found


def examine_all(
    model: nn.Module, without: Collection[str]
) -> Iterator[tuple[str, nn.Module, str, Examination]]:
    """Name, module, family and examination of all that is found in a model, except for parts left out."""
    known = _Layers()
    families = dict.fromkeys(family for part, family in PARTS.items() if part not in without)
    if LAYER in families:
        for name, module, found in layers(model, known):
            yield name, module, LAYER, found
    lazy: set[nn.Module] = set()  # heads, which a model may share with one that wraps it
    for name, module in model.named_modules():
        for family in families:
            other = None if family == LAYER else examine(module, family, known, without)
            if family == LOSS and other is not None:
                own = set(heads(module)) - lazy
                other, lazy = other if own else None, lazy | own
            if other is not None:
                yield name, module, family, other
