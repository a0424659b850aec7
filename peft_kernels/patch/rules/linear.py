"""The operands of linear layers, or why a layer has none for a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.wrong_types import an
from ...nf4.sharded.checks import UNGATHERED, is_sharded
from ...nf4.weight import PackedState, PackedWeight
from ..fused import Fallback
from ..input_spec import InputSpec
from . import linear4bit
from .calls import ORDINARY, hook_reason
from .linear_kind import FOUR_BIT, TRANSPOSED, linear_kind, unsupported_reason


class Base(NamedTuple):
    """The operands of a linear layer for one call, as ops take them."""

    weight: PackedWeight | PackedState | Tensor
    bias: Tensor | None
    dtype: torch.dtype
    """x is cast to it."""
    compute_dtype: torch.dtype
    """Of the base GEMM."""
    out_dtype: torch.dtype


def fused_operands(
    layer: Any, spec: InputSpec, called: bool = True, rounds_frozen: bool = True
) -> Base | Fallback:
    """The operands of a linear layer without adapters for x of such a spec, or why its own forward must run.

    called: the layer is called, and only its forward is replaced; if False the call is skipped too, so the
    layer may have no hooks.
    rounds_frozen: a frozen fp32 weight is rounded for autocast here; if False the caller does it.
    """
    kind = linear_kind(layer)
    if not kind:
        return Fallback(unsupported_reason(layer))
    if not called and (reason := hook_reason(layer, spec.device)):
        return Fallback(reason)
    # Not by attribute: a property, as of a parametrization, is not a parameter. Replicas of DataParallel and
    # unsharded views of FSDP are plain tensors on the instance.
    parameters = layer.__dict__["_parameters"]
    weight = parameters.get("weight")
    if weight is None and (weight := layer.__dict__.get("weight")) is None:
        return Fallback(f"the weight of {an(layer)} is not a parameter; remove the parametrization")
    bias = parameters["bias"] if "bias" in parameters else getattr(layer, "bias", None)
    bias = bias if isinstance(bias, Tensor) else None  # a module like nn.Linear may have none, or a flag
    dtype = spec.dtype if spec.autocast is None else spec.autocast
    if kind is FOUR_BIT:
        found = linear4bit.operands(layer, weight, spec)
    elif type(weight) is PackedWeight:
        found = weight._state, dtype, _packed_dtype(layer, weight, spec, dtype), dtype
    else:
        found = _dense(kind, weight, spec, dtype, rounds_frozen)
    if isinstance(found, Fallback):
        return found
    weight, dtype, compute, out_dtype = found
    if bias is not None and bias.dtype != dtype and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    return Base(weight, bias, dtype, compute, out_dtype)


def _packed_dtype(layer: Any, weight: PackedWeight, spec: InputSpec, dtype: torch.dtype) -> Any:
    if spec.autocast is not None or dtype != torch.float32:
        return dtype
    own = layer.__dict__.get("compute_dtype")
    if own is None:
        with torch._C.DisableTorchFunctionSubclass():  # costs microseconds, even for attributes
            return weight.dtype
    return own


def _dense(kind: str, weight: Any, spec: InputSpec, dtype: torch.dtype, rounds_frozen: bool) -> Any:
    if type(weight) not in ORDINARY:
        if is_sharded(weight):
            return Fallback(f"the base weight is sharded: {UNGATHERED}")
        return Fallback(f"the base weight is {an(weight)}; use a plain or packed weight")
    if weight.dtype != dtype:
        if spec.autocast is None:
            return Fallback(f"x is {spec.dtype}, the base weight {weight.dtype}; use one dtype, or autocast")
        if rounds_frozen or weight.dtype != torch.float32 or weight.requires_grad:
            weight = weight.to(dtype)
    return weight.t() if kind is TRANSPOSED else weight, dtype, dtype, dtype
