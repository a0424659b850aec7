"""May experts, and PEFT's adapters on their weights, be fused, and if not, why: as `judge`, for a mixture of
experts that keeps all experts' weights in one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...core.code_tables import WEIGHT_DTYPES
from ...core.module_calls import hooks_on_all
from ...nf4.experts_packing import NF4Experts, weight_names
from ...nf4.weight import NF4Weight
from .. import eligibility as judge
from .. import fused, sources, verify

_wrapper_classes: dict[tuple[type, Callable[..., Any]], str] = {}
_expert_classes: dict[tuple[type, Callable[..., Any], Any], str] = {}

CALLED = ("_activate_lora", "get_delta_weight", "get_delta_factors", "get_param")
"""What the forward of a `ParamWrapper` calls; not every version has all."""


def is_wrapper(module: Any) -> bool:
    """Whether a module is PEFT's LoRA layer over a parameter, fused or not."""
    if not judge.is_lora(module):
        return False
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:  # before 0.17
        return False
    return isinstance(module, ParamWrapper)


def nest(module: Any) -> Iterator[Any]:
    """A wrapper, and those that it is around, from the outermost on."""
    while is_wrapper(module):
        yield module
        module = module.__dict__["_modules"]["base_layer"]


def wrapped(wrappers: Sequence[Any]) -> Any:
    """The module that the wrappers are around."""
    return wrappers[-1].__dict__["_modules"]["base_layer"]


def parameters(wrappers: Sequence[Any], device: torch.device | None, ours: type[fused.Fused]) -> str:
    """Why the wrappers around one module, from the outermost on, would not run fused on an x on `device`
    (None: where the weights are), or ""."""
    experts = wrapped(wrappers)
    if reason := never(experts):
        return reason
    if len({wrapper.parameter_name for wrapper in wrappers}) != len(wrappers):
        return "several wrappers around one parameter"
    for wrapper in wrappers[1:]:
        if reason := judge.call_of(wrapper) or "":
            return reason
    return (
        judge.call_of(experts, device)
        or _weights(experts, device)
        or _stands_for_experts(experts)
        or next(filter(None, (_wrapper(wrapper, experts) for wrapper in wrappers)), "")
        or _stands_for_wrappers(wrappers, ours)
    )


def _wrapper(wrapper: Any, experts: Any) -> str:
    """Why the deltas of this wrapper are none that `experts_forward` adds, or ""."""
    name = wrapper.parameter_name
    if name not in weight_names(experts):
        return f"adapters on {name} are not fused"
    weight = experts.__dict__["_parameters"][name]
    if wrapper.num_experts != weight.shape[0] or (weight.shape[0] == 1 and transposed(experts)):
        return f"{name}: adapters for {wrapper.num_experts} experts, of {weight.shape[0]}"
    if wrapper.lora_variant:
        return f"{type(next(iter(wrapper.lora_variant.values()))).__name__} is not fused"
    return ""


def never(base: Any) -> str:
    """Why no adapter over this module could ever run fused, or ""."""
    if not all(hasattr(base, name) for name in ("has_gate", "has_bias", "has_post_expert_norm")):
        return f"no fused forward over the parameters of a {type(base).__name__}"
    return ""


def packed(experts: Any) -> str:
    """Why packed experts would not run on our kernels, or ""."""
    own = fused.plain_class(experts).forward is NF4Experts.forward
    return "" if own else f"a subclass with a forward of its own, {type(experts).__name__}"


def transposed(experts: Any) -> bool:
    """Whether weights are (experts, in_features, out_features)."""
    return bool(getattr(experts, "is_transposed", False))


def _weights(experts: Any, device: torch.device | None) -> str:
    """Why the weights of experts cannot be read as they are, or ""."""
    found = experts.__dict__["_parameters"]
    for name in weight_names(experts):
        weight = found.get(name)
        if weight is None:
            return f"{name} is not a parameter"
        if weight.requires_grad:
            return f"{name} is trained"
        if not isinstance(weight, NF4Weight) and weight.dtype not in WEIGHT_DTYPES:
            return f"{name} is of {weight.dtype}"
        bias = found.get(f"{name}_bias")
        if bias is not None and bias.requires_grad:
            return f"{name}_bias is trained"
        if device is not None and weight.device != device:
            return f"x is on {device}, {name} on {weight.device}"
    return ""


def _stands_for_experts(experts: Any) -> str:
    """Why `experts_forward` does not compute what the class of these experts does, or ""."""
    if isinstance(experts, NF4Experts):
        return packed(experts)
    cls = fused.plain_class(experts)
    chosen = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    key = cls, cls.forward, chosen
    found = _expert_classes.get(key)
    if found is None:
        found, tried = verify.experts(experts)
        if tried:
            _expert_classes[key] = found
    return found


def _stands_for_wrappers(wrappers: Sequence[Any], ours: type[fused.Fused]) -> str:
    """Why `ours` does not compute what the class of these wrappers does, or ""."""
    for cls in {fused.plain_class(wrapper): None for wrapper in wrappers}:
        key = cls, cls.forward
        found = _wrapper_classes.get(key)
        if found is None:
            _wrapper_classes[key] = ""  # while it is tried
            functions = [getattr(cls, name) for name in CALLED if hasattr(cls, name)]
            reason = sources.reason_unknown(cls.forward, *functions)
            found = "" if reason is None else verify.parameters(wrappers, ours, reason)
            _wrapper_classes[key] = found
            if found and hooks_on_all():  # which keep it from being tried
                del _wrapper_classes[key]
        if found:
            return found
    return ""
