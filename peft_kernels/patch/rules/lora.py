"""Decides whether LoRA layers of PEFT can be fused, and gives the reason if not.

`ours` is the class whose forward replaces that of a LoRA layer. Functions that return only a reason return ""
if there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.wrong_types import an
from ...ops.arguments import is_traced
from ...ops.lora.multi_lora import Adapter
from ..fused import Fallback, Fused, plain_class
from ..input_spec import InputSpec
from . import sources, trial
from .calls import hook_reason
from .linear_kind import TRANSPOSED, layer_reason, linear_kind
from .verdict import Verdict, cached, decide

_linear_forward = nn.Linear.forward
_CALLED = ("_mixed_batch_forward", "_check_forward_args", "_cast_input_dtype")
"""Methods that the forward of a LoRA layer calls."""


def is_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers, fused or not."""
    if "peft" not in sys.modules:  # a library that was never imported has no layers in a model
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def lora_linear_classes() -> tuple[Any, ...]:
    """PEFT's LoRA layers over linear bases that have a fused forward: `Linear`, and `Linear4bit` over
    bitsandbytes' layer."""
    from peft.tuners.lora import Linear

    try:
        from peft.tuners.lora import Linear4bit
    except ImportError:  # only where bitsandbytes is installed
        return (Linear,)
    return (Linear, Linear4bit)


def active_adapters(module: Any) -> list[str]:
    """Active adapters that the layer has. ValueError if one is given twice: PEFT would add it twice."""
    names = module.active_adapters
    known = module.__dict__["_modules"]["lora_A"].__dict__["_modules"]
    if len(names) == 1:
        return names if names[0] in known else []
    if len(set(names)) != len(names):
        raise ValueError(f"active adapters: expected each name once, got {', '.join(names)}")
    return [name for name in names if name in known]


def of_class(module: Any, ours: type[Fused]) -> Verdict:
    """Whether `ours` computes what the class of a LoRA layer does."""
    cls: Any = plain_class(module)
    key = "LoRA", cls, cls.forward
    found = cached(key)
    if found is not None:
        return found
    if reason := _own_reason(cls):
        return Verdict(reason=reason)
    functions = cls.forward, *(getattr(cls, name) for name in _CALLED)
    same = lambda: trial.lora(module, active_adapters(module), ours)  # noqa: E731
    return decide(key, lambda: sources.reason_unknown(*functions), same)


def _own_reason(cls: Any) -> str:
    """Why no forward of ours is meant for a class."""
    like = {one.forward: one for one in lora_linear_classes()}.get(cls.forward)
    if like is None:
        return f"no fused forward for {cls.__module__}.{cls.__qualname__}; nothing to do"
    own = next((name for name in _CALLED if getattr(cls, name) is not getattr(like, name)), "")
    return own and f"{cls.__module__}.{cls.__qualname__} has its own {own}; nothing to do"


def lora_reason(module: Any, ours: type[Fused]) -> str:
    """Why a LoRA layer with its active adapters cannot run fused, for any x."""
    if reason := of_class(module, ours).reason:  # other classes may store adapters elsewhere
        return reason
    names, layer = active_adapters(module), module._modules["base_layer"]
    reason = layer_reason(layer) or hook_reason(layer)
    spec = InputSpec(torch.float32, None, None)
    for name in names:
        if not reason:
            found = adapter_operands(module, name, spec.dtype, spec)
            reason = found.reason if isinstance(found, Fallback) else ""
    return reason or variant_reason(module, names, ours)


def adapter_operands(
    module: Any, name: str, dtype: torch.dtype, spec: InputSpec, group: int = 0
) -> Adapter | Fallback:
    """One adapter of a LoRA layer, for an x that was cast to `dtype`.

    Where autocast rounds x it rounds the adapter too, as it does the weights of nn.Linear; fp32 adapters are
    only marked, and rounded by the op.
    """
    # Dictionaries instead of attributes: this runs for every layer of every token.
    children = module.__dict__["_modules"]
    down = children["lora_A"].__dict__["_modules"][name]
    up = children["lora_B"].__dict__["_modules"][name]
    dropout = children["lora_dropout"].__dict__["_modules"][name]
    device = spec.device
    reason = hook_reason(down, device) or hook_reason(up, device) or hook_reason(dropout, device)
    if reason:
        return Fallback(reason)
    if type(down).forward is not _linear_forward or type(up).forward is not _linear_forward:
        return Fallback(f"an adapter is {an(down)} and {an(up)}; nothing to do")
    kind = type(dropout)
    if kind is nn.Identity:
        dropout_p = 0.0
    elif kind is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    else:
        return Fallback(f"lora_dropout is {an(dropout)}; use nn.Dropout")
    a, b, scaling = _weight(down), _weight(up), module.scaling[name]
    rounds = spec.autocast == dtype
    if rounds:
        rounds = a.dtype == b.dtype == torch.float32 and not isinstance(scaling, Tensor) and not is_traced()
        if not rounds:
            a, b = a.to(dtype), b.to(dtype)
    if a.dtype != dtype and a.dtype != torch.float32:
        a = a.float()
    if b.dtype != dtype and b.dtype != torch.float32:
        b = b.float()
    if type(scaling) is not float:
        if isinstance(scaling, Tensor):  # set by PEFT's hotswap for torch.compile, which must not read it
            b, scaling = b.float() * scaling, 1.0
        else:
            scaling = float(scaling)
    return Adapter(a, b, scaling, dropout_p, group, rounds)


def _weight(layer: Any) -> Any:
    """`layer.weight`, faster."""
    weight = layer.__dict__["_parameters"].get("weight")
    return layer.weight if weight is None else weight


def variant_reason(module: Any, names: Sequence[str], ours: type[Fused]) -> str:
    """Why no op computes these adapters together."""
    variants = module.lora_variant
    if not variants:
        return ""
    for name in names:
        variant = variants.get(name)
        if variant is None:
            continue
        from peft.tuners.lora.variants import DoraLinearVariant

        if type(variant) is not DoraLinearVariant:
            return f"{type(variant).__name__.removesuffix('LinearVariant')} is not fused; use LoRA or DoRA"
        if len(names) > 1:
            return f"DoRA together with other active adapters ({', '.join(names)}); activate one at a time"
        magnitude = module.lora_magnitude_vector[name]
        if magnitude.fan_in_fan_out and linear_kind(module.base_layer) is not TRANSPOSED:
            return "DoRA over a transposed weight; nothing to do"
        reason = hook_reason(magnitude) or _dora_reason(module, variant, magnitude, ours)
        if reason:
            return reason
    return ""


def sum_reason(module: Any, names: Sequence[str]) -> str:
    """Why an op over several layers cannot sum the deltas of these adapters."""
    variants = module.lora_variant
    return (
        "DoRA or another variant; use plain LoRA"
        if variants and any(name in variants for name in names)
        else ""
    )


def _dora_reason(module: Any, variant: Any, magnitude: Any, ours: type[Fused]) -> str:
    forwards = type(variant).forward, type(magnitude).forward
    key = "DoRA", *forwards
    found = cached(key) or decide(
        key,
        lambda: sources.reason_unknown(*forwards, type(magnitude).get_weight_norm),
        lambda: trial.lora(module, active_adapters(module), ours),
    )
    return found.reason
