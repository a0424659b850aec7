"""Decides whether experts whose weights are one parameter, and PEFT's adapters on them, can be fused.

Functions that return only a reason return "" if there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...core.code_tables import WEIGHT_DTYPES
from ...core.wrong_types import an
from ...nf4.experts_forward import weight_names
from ...nf4.experts_packing import NF4Experts
from ...nf4.weight import PackedWeight
from ..fused import Fused, plain_class
from . import sources, trial
from .calls import hook_reason
from .lora import is_lora
from .verdict import cached, decide

_CALLED = ("_activate_lora", "get_delta_weight", "get_delta_factors", "get_param")
"""Methods that the forward of a `ParamWrapper` calls; not every version has all."""


def is_wrapper(module: Any) -> bool:
    """Whether a module is PEFT's LoRA layer over a parameter, fused or not."""
    if not is_lora(module):
        return False
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(module, ParamWrapper)


def nest(module: Any) -> Iterator[Any]:
    """A wrapper and the wrappers inside it, from the outermost on. Empty for other modules."""
    while is_wrapper(module):
        yield module
        module = module.__dict__["_modules"]["base_layer"]


def wrapped(wrappers: Sequence[Any]) -> Any:
    """The module inside the wrappers."""
    return wrappers[-1].__dict__["_modules"]["base_layer"]


def wrappers_reason(wrappers: Sequence[Any], device: torch.device | None, ours: type[Fused]) -> str:
    """Why the wrappers around one module, from the outermost on, cannot run fused for an x on `device` (None:
    the device of the weights)."""
    experts = wrapped(wrappers)
    if reason := never_reason(experts):
        return reason
    if len({wrapper.parameter_name for wrapper in wrappers}) != len(wrappers):
        return "several wrappers around one parameter; use one adapter for it"
    for wrapper in wrappers[1:]:
        if reason := hook_reason(wrapper):
            return reason
    return (
        hook_reason(experts, device)
        or _weights_reason(experts, device)
        or _experts_class_reason(experts)
        or next(filter(None, (_wrapper_reason(wrapper, experts) for wrapper in wrappers)), "")
        or _wrapper_class_reason(wrappers, ours)
    )


def _wrapper_reason(wrapper: Any, experts: Any) -> str:
    """Why `experts_forward` cannot add the deltas of this wrapper."""
    name = wrapper.parameter_name
    if name not in weight_names(experts):
        return f"adapters on {name} are not fused; nothing to do"
    weight = experts.__dict__["_parameters"][name]
    if wrapper.num_experts != weight.shape[0] or (weight.shape[0] == 1 and transposed(experts)):
        return f"{name}: adapters for {wrapper.num_experts} experts, of {weight.shape[0]}; nothing to do"
    if wrapper.lora_variant:
        return f"{type(next(iter(wrapper.lora_variant.values()))).__name__} is not fused; use plain LoRA"
    return ""


def never_reason(base: Any) -> str:
    """Why no adapter on the parameters of this module can ever run fused."""
    known = hasattr(base, "has_bias") and hasattr(base, "is_transposed")
    return "" if known else f"no fused forward over the parameters of {an(base)}; nothing to do"


def packed_reason(experts: Any) -> str:
    """Why packed experts do not run on our kernels."""
    own = plain_class(experts).forward is NF4Experts.forward
    return "" if own else f"a subclass with its own forward, {type(experts).__name__}; nothing to do"


def transposed(experts: Any) -> bool:
    """Whether the weights are (experts, in_features, out_features)."""
    return bool(getattr(experts, "is_transposed", False))


def _weights_reason(experts: Any, device: torch.device | None) -> str:
    """Why the kernels cannot read the weights of experts."""
    found = experts.__dict__["_parameters"]
    for name in weight_names(experts):
        weight = found.get(name)
        if weight is None:
            return f"{name} is not a parameter; remove the parametrization"
        if weight.requires_grad:
            return f"{name} is trained; freeze it to fuse it"
        if not isinstance(weight, PackedWeight) and weight.dtype not in WEIGHT_DTYPES:
            return f"{name} is of {weight.dtype}; cast it to fp32, bf16 or fp16"
        bias = found.get(f"{name}_bias")
        if bias is not None and bias.requires_grad:
            return f"{name}_bias is trained; freeze it to fuse it"
        if device is not None and weight.device != device:
            return f"x is on {device}, {name} on {weight.device}; use one device"
    return ""


def _experts_class_reason(experts: Any) -> str:
    """Why `experts_forward` does not compute what the class of these experts does."""
    if isinstance(experts, NF4Experts):
        return packed_reason(experts)
    cls = plain_class(experts)
    chosen = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    key = "experts", cls, cls.forward, chosen
    name = f"{cls.__module__}.{cls.__qualname__}"
    found = cached(key) or decide(key, lambda: f"{name} is not known", lambda: trial.experts(experts))
    return found.reason


def _wrapper_class_reason(wrappers: Sequence[Any], ours: type[Fused]) -> str:
    """Why `ours` does not compute what the class of these wrappers does."""
    for cls in {plain_class(wrapper): None for wrapper in wrappers}:
        functions = [getattr(cls, name) for name in ("forward", *_CALLED) if hasattr(cls, name)]
        key = "wrapper", cls, cls.forward
        found = cached(key) or decide(
            key,
            lambda functions=functions: sources.reason_unknown(*functions),  # type: ignore[misc]
            lambda: trial.parameters(wrappers, ours),
        )
        if found.reason:
            return found.reason
    return ""
