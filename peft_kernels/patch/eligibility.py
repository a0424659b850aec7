"""May a layer be fused, and if not, why: the one place that knows.

Patching asks it, and every call does, since anything may have changed in between; so what a call asks is
cheap. An answer of type str is the reason why the original forward must run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # parameters while torch.export traces

from ..core.module_calls import hooks_on_all, more_than_forward
from ..nf4 import bitsandbytes_format as bitsandbytes
from ..nf4.sharded.checks import UNGATHERED, is_sharded, is_tensor_parallel
from ..nf4.weight import NF4State, NF4Weight
from ..nn import NF4Linear
from ..ops.arguments import autocast_dtype, is_traced
from ..ops.lora.multi_lora import Adapter
from . import fused, sources, verify

PARALLEL = "tensor parallelism: its forward runs between collectives, which a fused one would pass by"

Forward = Callable[..., Any]

DENSE, TRANSPOSED, FOUR_BIT = "dense", "transposed", "4-bit"
"""What the forward of a linear layer does with its weight: x W^T, x W, or x W^T of bitsandbytes' packed W."""

_LINEAR_SOURCES = {
    ("transformers.pytorch_utils", "Conv1D.forward"): TRANSPOSED,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear.forward"): DENSE,
    ("bitsandbytes.nn.modules", "Linear4bit.forward"): FOUR_BIT,
}
_linear_forwards: dict[Forward, str] = {nn.Linear.forward: DENSE, NF4Linear.forward: DENSE}
_lora_classes: dict[tuple[type, Forward], str] = {}
_ORDINARY = (nn.Parameter, Tensor, FakeTensor)
"""Dense weights. Other subclasses of Tensor may be a product of their own."""
_doras: dict[tuple[Forward, Forward], str] = {}
_linear_forward = nn.Linear.forward


class Base(NamedTuple):
    """A linear layer in one call, as ops take it."""

    weight: NF4Weight | NF4State | Tensor
    bias: Tensor | None
    dtype: torch.dtype
    """What x is to be cast to."""
    compute_dtype: torch.dtype
    """That of the base product."""
    out_dtype: torch.dtype


# Modules whose call a fused forward leaves out.


def call_of(part: nn.Module, device: torch.device | None = None) -> str | None:
    """Why calling `part` with an x on `device` (None: where `part` is) is more than the forward of its
    class."""
    more = more_than_forward(part)
    if more:
        return more
    return _replaced(part, device) if "forward" in part.__dict__ else None


def _replaced(part: nn.Module, device: torch.device | None) -> str | None:
    """Why the forward that is set on an instance matters, or None: an accelerate hook that moves x to where
    the weight is does nothing to an x that is there already, and any other x takes the original forward."""
    d = part.__dict__
    if fused.is_own(part, d["forward"]):
        return None
    hook = d.get("_hf_hook")
    if hook is None or not fused.is_own(part, d.get("_old_forward")):
        if is_tensor_parallel(d["_parameters"].get("weight")):
            return PARALLEL
        return f"the forward of a {type(part).__name__} was replaced on the instance"
    for one in getattr(hook, "hooks", (hook,)):
        if type(one).__name__ != "AlignDevicesHook" or one.no_grad:
            return f"an accelerate hook inside ({type(one).__name__})"
        if one.offload or one.io_same_device:
            return "an accelerate hook inside that offloads weights"
        place = one.execution_device
        if device is not None and place is not None:
            there = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
            if there != device:
                return f"x is on {device}, an accelerate hook moves it to {there}"
    return None


# Linear layers.


def linear(layer: nn.Module) -> str:
    """What the forward of a linear layer does (DENSE, ...), or "": it is none that is known here."""
    forward: Any = fused.plain_class(layer).forward
    found = _linear_forwards.get(forward)
    if found is None:
        place = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
        found = _LINEAR_SOURCES.get(place, "")
        if found and not sources.known(forward):
            found = ""
        _linear_forwards[forward] = found
    return found


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer is NF4 in our own format, whole or one process's part of it."""
    weight = layer._parameters.get("weight")
    return isinstance(weight, NF4Weight) or is_sharded(weight) or is_tensor_parallel(weight)


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.nn.modules import Linear4bit

    return isinstance(module, Linear4bit)


def unusable(layer: Any) -> str:
    """Why the weight of a FOUR_BIT layer cannot be read in place, or ""."""
    return bitsandbytes.reason_unusable(layer.weight) or ""


def base(layer: Any, x_dtype: torch.dtype, device: torch.device) -> Base | str:
    """A linear layer without adapters, for an x of that dtype and on that device, whose call is left out."""
    reason = call_of(layer, device) if linear(layer) else None
    return operands(layer, x_dtype, device) if reason is None else reason


def operands(
    layer: Any, x_dtype: torch.dtype, device: torch.device, rounds_frozen: bool = True
) -> Base | str:
    """As `base`, where the layer is called all the same, hooks and all, and only its forward is left out.
    `rounds_frozen`: False where a frozen weight of fp32 will be rounded, for autocast, by who takes it."""
    kind = linear(layer)
    if not kind:
        return no_forward(layer)
    d = layer.__dict__
    # Not by attribute: a property (of a parametrisation, say) is no parameter. Replicas of DataParallel and
    # FSDP's unsharded views are plain tensors on the instance.
    parameters = d["_parameters"]
    weight = parameters.get("weight")
    if weight is None:
        weight = d.get("weight")
        if weight is None:
            return f"the weight of a {type(layer).__name__} is not a parameter"
    bias = parameters["bias"] if "bias" in parameters else layer.bias  # noqa: SIM401 (asks twice)
    autocast = autocast_dtype(device.type)
    dtype = out_dtype = x_dtype if autocast is None else autocast
    if kind is FOUR_BIT:
        reason = bitsandbytes.reason_unusable(weight)
        if reason is not None:
            return reason
        compute, out_dtype = _compute_dtype(layer, x_dtype), x_dtype
        weight = _state_of(weight)
        # The wider of both: the delta is computed from x as it is, but where autocast rounds x for it.
        rounds = x_dtype == compute or autocast == compute
        dtype = compute if rounds else torch.promote_types(x_dtype, compute)
    elif type(weight) is NF4Weight:
        compute = dtype
        if autocast is None and dtype == torch.float32:
            compute = d.get("compute_dtype")
            if compute is None:
                with torch._C.DisableTorchFunctionSubclass():  # for attributes too, ours costs microseconds
                    compute = weight.dtype
        weight = weight._state
    else:
        if type(weight) not in _ORDINARY:
            if is_sharded(weight):
                return f"the base weight is sharded: {UNGATHERED}"
            return f"the base weight is a {type(weight).__name__}"
        compute = dtype
        if weight.dtype != dtype:
            if autocast is None:
                return f"x is {x_dtype}, the base weight {weight.dtype}"
            if rounds_frozen or weight.dtype != torch.float32 or weight.requires_grad:
                weight = weight.to(dtype)
        if kind is TRANSPOSED:
            weight = weight.t()
    if bias is not None and bias.dtype != dtype and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    return Base(weight, bias, dtype, compute, out_dtype)


def _compute_dtype(layer: Any, x_dtype: torch.dtype) -> torch.dtype:
    """The type that bitsandbytes would compute in: the layer's if it was given one, else that of x."""
    own: torch.dtype | None = layer.compute_dtype
    return own if own is not None and (layer.compute_type_is_set or x_dtype == torch.float16) else x_dtype


def _state_of(weight: Any) -> NF4State:
    """`bitsandbytes.state_of` without its checks, for a weight as bitsandbytes keeps it; back ends check
    sizes."""
    quant_state = weight.quant_state
    if weight.dtype is not torch.uint8 or quant_state.absmax.dtype not in (torch.uint8, torch.float32):
        return bitsandbytes.state_of(weight)
    out_features, in_features = quant_state.shape
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit has one, which costs several times the rest
        packed = weight.view(out_features, in_features // 2) if in_features % 2 == 0 else weight.view(-1)
    second, offset = (quant_state.state2.absmax, quant_state.offset) if quant_state.nested else (None, None)
    return NF4State(
        (out_features, in_features), quant_state.blocksize, packed, quant_state.absmax, second, offset
    )


def no_forward(layer: Any) -> str:
    if hasattr(layer, "base_layer"):
        return "another tuner layer lies between it and its base layer"
    return f"no fused forward over a base of type {type(layer).__name__}"


# LoRA layers of PEFT.


def is_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers, fused or not."""
    if "peft" not in sys.modules:  # a library that was never imported has no layers in a model
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def lora_class(module: nn.Module, ours: type[fused.Fused]) -> str:
    """Why a LoRA layer of this class is not one whose forward `ours` stands in for, or ""."""
    cls = fused.plain_class(module)
    key = cls, cls.forward
    found = _lora_classes.get(key)
    if found is None:
        _lora_classes[key] = ""  # while it is tried
        found = _lora_classes[key] = _judge_lora_class(cls, module, ours)
        if found and hooks_on_all():  # which keep it from being tried
            del _lora_classes[key]
    return found


def lora_linear_classes() -> tuple[Any, ...]:
    """PEFT's layers over linear bases, whose forwards ours stands in for: `Linear`, and over bitsandbytes
    `Linear4bit`."""
    from peft.tuners.lora import Linear

    try:
        from peft.tuners.lora import Linear4bit
    except ImportError:  # PEFT has it where bitsandbytes is
        return (Linear,)
    return (Linear, Linear4bit)


def _judge_lora_class(cls: Any, module: Any, ours: type[fused.Fused]) -> str:
    stands_for = {one.forward: one for one in lora_linear_classes()}.get(cls.forward)
    if stands_for is None:
        return f"no fused forward for {cls.__module__}.{cls.__qualname__}"
    called = ("_mixed_batch_forward", "_check_forward_args", "_cast_input_dtype")
    for name in called:
        if getattr(cls, name) is not getattr(stands_for, name):
            return f"{cls.__module__}.{cls.__qualname__} has its own {name}"
    reason = sources.reason_unknown(cls.forward, *(getattr(cls, name) for name in called))
    return "" if reason is None else verify.lora(module, active(module), ours, reason)


def lora(module: Any, names: Sequence[str], ours: type[fused.Fused]) -> str:
    """Why a LoRA layer with the active adapters `names` would not run fused, whatever x is, or ""."""
    layer = module._modules["base_layer"]
    reason = lora_class(module, ours) or ("" if linear(layer) else no_forward(layer))
    if reason:
        return reason
    reason = unusable(layer) if linear(layer) is FOUR_BIT else ""
    reason = reason or call_of(layer) or ""
    for name in names:
        if not reason:
            found = adapter(module, name, torch.float32, None)
            reason = found if isinstance(found, str) else ""
    return reason or variants(module, names, ours)


def adapter(
    module: Any, name: str, dtype: torch.dtype, device: torch.device | None, group: int = 0,
    rounds: bool = False,
) -> Adapter | str:  # fmt: skip
    """One adapter of a LoRA layer, for x that was cast to `dtype`. `rounds`: the adapter is to be rounded to
    it too, as autocast casts the weights of nn.Linear; in fp32 that is left to the call that it is for."""
    # Dictionaries of children, where attributes would do: this runs for every layer of every token.
    children = module.__dict__["_modules"]
    down = children["lora_A"].__dict__["_modules"][name]
    up = children["lora_B"].__dict__["_modules"][name]
    dropout = children["lora_dropout"].__dict__["_modules"][name]
    reason = call_of(down, device) or call_of(up, device) or call_of(dropout, device)
    if reason is not None:
        return reason
    if type(down).forward is not _linear_forward or type(up).forward is not _linear_forward:
        return f"an adapter is a {type(down).__name__} and a {type(up).__name__}"
    kind = type(dropout)
    if kind is nn.Identity:
        dropout_p = 0.0
    elif kind is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    else:
        return f"lora_dropout is a {kind.__name__}"
    a, b, scaling = _weight(down), _weight(up), module.scaling[name]
    if rounds:
        rounds = a.dtype == b.dtype == torch.float32 and not isinstance(scaling, Tensor) and not is_traced()
        if not rounds:
            a, b = a.to(dtype), b.to(dtype)
    if a.dtype != dtype and a.dtype != torch.float32:
        a = a.float()
    if b.dtype != dtype and b.dtype != torch.float32:
        b = b.float()
    if type(scaling) is not float:
        if isinstance(scaling, Tensor):  # of PEFT's hotswap, under torch.compile: not to be read here
            b, scaling = b.float() * scaling, 1.0
        else:
            scaling = float(scaling)
    return Adapter(a, b, scaling, dropout_p, group, rounds)


def _weight(layer: Any) -> Any:
    """`layer.weight`, sooner."""
    weight = layer.__dict__["_parameters"].get("weight")
    return layer.weight if weight is None else weight


def variants(module: Any, names: Sequence[str], ours: type[fused.Fused]) -> str:
    """Why these adapters together are nothing that an op computes, or ""."""
    found = module.lora_variant
    if not found:
        return ""
    for name in names:
        variant = found.get(name)
        if variant is None:
            continue
        from peft.tuners.lora.variants import DoraLinearVariant

        if type(variant) is not DoraLinearVariant:
            return f"{type(variant).__name__.removesuffix('LinearVariant')} is not fused"
        if len(names) > 1:
            return f"DoRA beside other active adapters ({', '.join(names)})"
        magnitude = module.lora_magnitude_vector[name]
        if magnitude.fan_in_fan_out and linear(module.base_layer) is not TRANSPOSED:
            return "DoRA over a transposed weight"
        reason = call_of(magnitude) or _dora(module, variant, magnitude, ours)
        if reason:
            return reason
    return ""


def summed(module: Any, names: Sequence[str]) -> str:
    """Why these adapters are not all plain LoRA, whose deltas an op over several layers sums, or ""."""
    found = module.lora_variant
    return "DoRA or another variant" if found and any(name in found for name in names) else ""


def _dora(module: Any, variant: Any, magnitude: Any, ours: type[fused.Fused]) -> str:
    key = type(variant).forward, type(magnitude).forward
    found = _doras.get(key)
    if found is None:
        _doras[key] = ""  # while it is tried
        reason = sources.reason_unknown(*key, type(magnitude).get_weight_norm)
        found = _doras[key] = "" if reason is None else verify.lora(module, active(module), ours, reason)
        if found and hooks_on_all():
            del _doras[key]
    return found


def active(module: Any) -> list[str]:
    """Active adapters that a layer has. ValueError when one is given twice: PEFT would add it twice."""
    names = module.active_adapters
    there = module.__dict__["_modules"]["lora_A"].__dict__["_modules"]
    if len(names) == 1:
        return names if names[0] in there else []
    if len(set(names)) != len(names):
        raise ValueError(f"active adapters: expected each name once, got {', '.join(names)}")
    return [name for name in names if name in there]
