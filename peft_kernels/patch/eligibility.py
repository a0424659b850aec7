"""Decides whether linear and LoRA layers can be fused, and gives the reason if not.

Used when a model is patched, and again when a layer is called after something about it changed, so the checks
are cheap. Functions that return only a reason return "" if there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # parameters while torch.export traces

from ..core import dispatch
from ..core.module_calls import class_forward, is_compiled_by_jit, more_than_forward
from ..core.wrong_types import an
from ..nf4 import bitsandbytes_format
from ..nf4.sharded.checks import UNGATHERED, is_sharded, is_tensor_parallel
from ..nf4.weight import PackedState, PackedWeight
from ..nn import NF4Linear
from . import fused, sources
from .fused import Fallback
from .input_spec import InputSpec

NO_KERNEL = "has no kernel for it here; see pk.explain()"
PARALLEL = (
    "tensor parallelism: its forward runs between collectives, which a fused one would skip; nothing to do"
)

Forward = Callable[..., Any]

DENSE, TRANSPOSED, FOUR_BIT = "dense", "transposed", "4-bit"
"""Kinds of linear layers, by what forward computes: x W^T, x W, or x W^T with bitsandbytes' packed W."""

_LINEAR_SOURCES = {
    ("transformers.pytorch_utils", "Conv1D.forward"): TRANSPOSED,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear.forward"): DENSE,
    ("bitsandbytes.nn.modules", "Linear4bit.forward"): FOUR_BIT,
}
_linear_forwards: dict[Forward, str] = {nn.Linear.forward: DENSE, NF4Linear.forward: DENSE}
_ORDINARY = (nn.Parameter, Tensor, FakeTensor)
"""Types of dense weights. Other subclasses of Tensor may define their own matmul."""


class Base(NamedTuple):
    """The operands of a linear layer for one call, as ops take them."""

    weight: PackedWeight | PackedState | Tensor
    bias: Tensor | None
    dtype: torch.dtype
    """x is cast to it."""
    compute_dtype: torch.dtype
    """Of the base GEMM."""
    out_dtype: torch.dtype


def device_reason(like: Tensor, op: str) -> str:
    """Why `op` would be composed of torch's functions on the device of a tensor, or ""."""
    kind = like.device.type
    if kind in ("cpu", "meta") or dispatch.has_kernel(op, like):
        return ""
    return f"{kind} {NO_KERNEL}"


# Modules whose call is skipped by a fused forward.


def hook_reason(module: nn.Module, device: torch.device | None = None) -> str:
    """Why calling `module` with an x on `device` (None: the device of the module) does more than the forward
    of its class."""
    return more_than_forward(module) or (
        _replaced_reason(module, device) if "forward" in module.__dict__ else ""
    )


def _replaced_reason(module: nn.Module, device: torch.device | None) -> str:
    """Why a forward set on the instance matters. A hook of accelerate that moves x to the device of the
    weight does nothing to an x that is already there."""
    d = module.__dict__
    if fused.is_own(module, d["forward"]):
        return ""
    if is_compiled_by_jit(module):
        return f"{type(module).__name__} is compiled by torch.jit; nothing to do"
    hook = d.get("_hf_hook")
    if hook is None or not fused.is_own(module, d.get("_old_forward")):
        if is_tensor_parallel(d["_parameters"].get("weight")):
            return PARALLEL
        return f"the forward of {an(module)} was replaced on the instance; restore it to fuse it"
    for one in getattr(hook, "hooks", (hook,)):
        if type(one).__name__ != "AlignDevicesHook" or one.no_grad:
            return f"an accelerate hook inside ({type(one).__name__}); remove it to fuse it"
        if one.offload or one.io_same_device:
            return "an accelerate hook inside that offloads weights; keep the weights on the device"
        target = one.execution_device
        if device is not None and target is not None:
            target = torch.device("cuda", target) if isinstance(target, int) else torch.device(target)
            if target != device:
                return f"x is on {device}, an accelerate hook moves it to {target}; keep both on one device"
    return ""


# Linear layers.


def linear_kind(layer: nn.Module) -> str:
    """DENSE, TRANSPOSED or FOUR_BIT, or "" if the forward of the layer is not a known one."""
    forward = class_forward(fused.plain_class(layer))
    kind = _linear_forwards.get(forward)
    if kind is None:
        name = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
        kind = _LINEAR_SOURCES.get(name, "")
        if kind and not sources.known(forward):
            kind = ""
        _linear_forwards[forward] = kind
    return kind


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer is a PackedWeight, whole or one rank's shard."""
    weight = layer._parameters.get("weight")
    return isinstance(weight, PackedWeight) or is_sharded(weight) or is_tensor_parallel(weight)


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' Linear4bit."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.nn.modules import Linear4bit

    return isinstance(module, Linear4bit)


def layer_reason(layer: Any) -> str:
    """Why no fused forward covers a linear layer, for any x."""
    kind = linear_kind(layer)
    if not kind:
        return unsupported_reason(layer)
    return _four_bit_reason(layer.weight) or "" if kind is FOUR_BIT else ""


def _four_bit_reason(weight: Any) -> str | None:
    return bitsandbytes_format.reason_unusable(weight) or bitsandbytes_format.reason_other_table(weight)


def unsupported_reason(layer: Any) -> str:
    """Why the forward of a layer without a `linear_kind` cannot be fused."""
    if hasattr(layer, "base_layer"):
        return "another tuner layer lies between it and its base layer; use one tuner"
    return f"no fused forward over a base of type {type(layer).__name__}; nothing to do"


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
    bias = parameters["bias"] if "bias" in parameters else layer.bias  # noqa: SIM401 (evaluates both)
    dtype = spec.dtype if spec.autocast is None else spec.autocast
    if kind is FOUR_BIT:
        found = _four_bit(layer, weight, spec)
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


# What ops take of each kind of weight: the weight, and the dtypes of Base.


def _four_bit(layer: Any, weight: Any, spec: InputSpec) -> Any:
    if (unusable := _four_bit_reason(weight)) is not None:
        return Fallback(unusable)
    compute = _compute_dtype(layer, spec.dtype)
    # The delta is computed from x in the wider dtype, unless autocast rounds x for it.
    rounds = spec.dtype == compute or spec.autocast == compute
    dtype = compute if rounds else torch.promote_types(spec.dtype, compute)
    return _state_of(weight), dtype, compute, spec.dtype


def _packed_dtype(layer: Any, weight: PackedWeight, spec: InputSpec, dtype: torch.dtype) -> Any:
    if spec.autocast is not None or dtype != torch.float32:
        return dtype
    own = layer.__dict__.get("compute_dtype")
    if own is None:
        with torch._C.DisableTorchFunctionSubclass():  # costs microseconds, even for attributes
            return weight.dtype
    return own


def _dense(kind: str, weight: Any, spec: InputSpec, dtype: torch.dtype, rounds_frozen: bool) -> Any:
    if type(weight) not in _ORDINARY:
        if is_sharded(weight):
            return Fallback(f"the base weight is sharded: {UNGATHERED}")
        return Fallback(f"the base weight is {an(weight)}; use a plain or packed weight")
    if weight.dtype != dtype:
        if spec.autocast is None:
            return Fallback(f"x is {spec.dtype}, the base weight {weight.dtype}; use one dtype, or autocast")
        if rounds_frozen or weight.dtype != torch.float32 or weight.requires_grad:
            weight = weight.to(dtype)
    return weight.t() if kind is TRANSPOSED else weight, dtype, dtype, dtype


def _compute_dtype(layer: Any, x_dtype: torch.dtype) -> torch.dtype:
    """The dtype bitsandbytes would compute in: the layer's if it was set, else that of x."""
    own: torch.dtype | None = layer.compute_dtype
    return own if own is not None and (layer.compute_type_is_set or x_dtype == torch.float16) else x_dtype


def _state_of(weight: Any) -> PackedState:
    """`bitsandbytes.state_of` without its checks, for a weight in bitsandbytes' layout; back ends check
    sizes."""
    quant_state = weight.quant_state
    if weight.dtype is not torch.uint8 or quant_state.absmax.dtype not in (torch.uint8, torch.float32):
        return bitsandbytes_format.state_of(weight)
    shape, absmax = tuple(quant_state.shape), quant_state.absmax
    # The torch function of Params4bit takes several times as long as the rest.
    with torch._C.DisableTorchFunctionSubclass():
        packed = weight.view(shape[0], shape[1] // 2) if shape[1] % 2 == 0 else weight.view(-1)
    second, offset = (quant_state.state2.absmax, quant_state.offset) if quant_state.nested else (None, None)
    format = quant_state.quant_type
    return PackedState(shape, quant_state.blocksize, packed, absmax, second, offset, format=format)
