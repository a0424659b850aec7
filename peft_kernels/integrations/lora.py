"""PEFT's LoRA layers on our kernels: `LoraLayer.forward` over nn.Linear, NF4Linear and Linear4bit.

A forward looks at the layer as it is at that moment (active adapters, dropout, merged or not), so everything
that PEFT can do to a layer between two calls is seen. What no op covers goes through PEFT's own forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import AdaptedLinear, Adapter, dora_linear, lora_linear, multi_lora_linear
from ..nf4 import NF4Weight
from . import bitsandbytes, linear4bit
from .forward import replaced

if TYPE_CHECKING:
    from .shared_input import SharedInput

HOOKED = "hooks on the base layer or an adapter, which a fused forward would pass by"
BASE = "__base__"
"""PEFT's name for rows without an adapter."""


def examine(module: nn.Module) -> tuple[str | None, Callable[..., Any] | None, str]:
    """See `layers.examine`."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None, None, ""
    base = module.get_base_layer()
    kind = f"PEFT LoRA {type(module).__name__} on {type(base).__name__}"
    if type(module).forward not in _lora_forwards():
        return kind, None, f"no fused forward for {type(module).__module__}.{type(module).__qualname__}"
    reason = _reason_base(module, base)
    if reason is not None:
        return kind, None, reason
    reason = _reason_adapters(module, active_names(module))
    return kind, forward, "" if reason is None else f"{reason}: original forward"


def forward(
    module: Any,
    x: Tensor,
    *args: Any,
    fallbacks: Counter[str],
    shared: SharedInput | None = None,
    **kwargs: Any,
) -> Tensor:
    """`LoraLayer.forward`: base product and deltas of the adapters in one op."""
    if module.disable_adapters or (module.merged and kwargs.get("adapter_names") is None):
        return type(module).forward(module, x, *args, **kwargs)  # the base layer alone, as it is meant to be
    if shared is not None:
        y = shared.take(module, x, bool(args or kwargs))
        if y is not None:
            return y
    reason = None
    adapter_names = kwargs.pop("adapter_names", None)
    if args or any(value is not None for value in kwargs.values()):
        reason = f"extra arguments ({', '.join(kwargs) or 'positional'})"
    call = None
    if reason is None:
        if adapter_names is not None:
            module._check_forward_args(x, adapter_names=adapter_names)
            names = [name for name in dict.fromkeys(adapter_names) if name in module.lora_A]
        else:
            names = active_names(module)
        if not names:
            return module.base_layer(x)
        call = prepare(module, x, names, mixed=adapter_names is not None)
        reason = call if isinstance(call, str) else None
    if not isinstance(call, Call):
        fallbacks[reason or ""] += 1
        if adapter_names is not None:
            kwargs["adapter_names"] = adapter_names
        return type(module).forward(module, x, *args, **kwargs)
    return _run(module, call, x, names, adapter_names)


def active_names(module: Any) -> list[str]:
    """Active adapters that this layer has. ValueError when one is given twice: PEFT would add it twice."""
    active = module.active_adapters
    if len(set(active)) != len(active):
        raise ValueError(f"active adapters: expected each name once, got {', '.join(active)}")
    return [name for name in active if name in module.lora_A]


@dataclass
class Call:
    """One call of a layer, ready for an op."""

    layer: AdaptedLinear
    dtype: torch.dtype
    """What x is to be cast to."""
    out_dtype: torch.dtype


def prepare(module: Any, x: Tensor, names: Sequence[str], mixed: bool = False) -> Call | str:
    """The layer with the adapters `names`, or why a fused forward would not do what PEFT's does.

    `mixed`: each row takes one of them, so their biases (`lora_bias=True`) are left to the caller.
    """
    # Dictionaries of children, where attributes would do: this runs for every layer of every token.
    children: Any = module._modules
    base = children["base_layer"]
    lora_a, lora_b, lora_dropout = (children[part]._modules for part in ("lora_A", "lora_B", "lora_dropout"))
    if has_hooks(base):
        return HOOKED
    for name in names:
        if has_hooks(lora_a[name]) or has_hooks(lora_b[name]) or has_hooks(lora_dropout[name]):
            return HOOKED
    reason = _reason_adapters(module, names)
    if reason is not None:
        return reason
    call = prepare_base(base, x)
    if isinstance(call, str):
        return call
    adapters = []
    bias: Any = call.layer.bias
    for group, name in enumerate(names):
        b, scaling = lora_b[name], module.scaling[name]
        if b.bias is not None and not mixed:
            delta = scaling * b.bias.float()
            bias = delta if bias is None else bias.float() + delta
        down, up = (_adapter(layer.weight, call.dtype) for layer in (lora_a[name], b))
        adapters.append(Adapter(down, up, scaling, _dropout_p(lora_dropout[name]), group))
    call.layer = AdaptedLinear(call.layer.weight, bias, adapters)
    return call


def prepare_base(base: Any, x: Tensor) -> Call | str:
    """A linear layer without adapters, or why no op can take it."""
    weight = base.weight
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    out_dtype = dtype
    if hasattr(weight, "quant_state"):
        out_dtype = x.dtype  # Linear4bit answers in the type of its input
        dtype = linear4bit.compute_dtype(base, x)
        if not autocast and torch.promote_types(x.dtype, dtype) != dtype:
            # PEFT computes the delta in the adapter's type, from x as it is; the op would from x in `dtype`.
            return f"x is {x.dtype}, the base layer computes in {dtype}"
        reason = bitsandbytes.reason_unusable(weight)
        if reason is not None:
            return reason
        weight = linear4bit.state(base)
    elif not isinstance(weight, NF4Weight):
        if type(weight) is not nn.Parameter:
            return f"the base weight is a {type(weight).__name__}"
        if weight.dtype != x.dtype and not autocast:
            return f"x is {x.dtype}, the base weight {weight.dtype}"
        weight = weight.to(dtype)
    bias = None if base.bias is None else base.bias.to(dtype)
    return Call(AdaptedLinear(weight, bias), dtype, out_dtype)


def _run(
    module: Any, call: Call, x: Tensor, names: Sequence[str], adapter_names: Sequence[str] | None
) -> Tensor:
    layer, x = call.layer, x.to(call.dtype)
    if adapter_names is not None:
        group_of = {name: group for group, name in enumerate(names)}
        groups = torch.tensor([group_of.get(name, -1) for name in adapter_names], device=x.device)
        rows = x[..., 0].numel() // len(adapter_names) if adapter_names else 0
        y = multi_lora_linear(x, [layer], groups.repeat_interleave(rows))[0]
        biases = [
            (group_of[n], module.scaling[n] * b) for n in names if (b := module.lora_B[n].bias) is not None
        ]
        if biases:
            table = y.new_zeros(len(names) + 1, y.shape[-1], dtype=torch.float32)  # the last row: no adapter
            for group, bias in biases:
                table[group] = bias
            y = y + table[groups].view(-1, *[1] * (y.dim() - 2), y.shape[-1])
    elif len(names) == 1 and names[0] in module.lora_variant:
        (adapter,) = layer.adapters
        magnitude = module.lora_magnitude_vector[names[0]].weight
        y = dora_linear(
            x, layer.weight, adapter.lora_a, adapter.lora_b, magnitude, adapter.scaling, layer.bias,
            adapter.dropout_p,
        )  # fmt: skip
    elif len(names) == 1:
        (adapter,) = layer.adapters
        y = lora_linear(
            x, layer.weight, adapter.lora_a, adapter.lora_b, adapter.scaling, layer.bias, adapter.dropout_p
        )
    else:
        y = multi_lora_linear(x, [layer])[0]
    return y.to(call.out_dtype)


def linear_layers() -> tuple[type[Any], ...]:
    """PEFT's layers over linear bases: `Linear`, and with bitsandbytes `Linear4bit`."""
    from peft.tuners.lora import Linear

    try:
        from peft.tuners.lora import Linear4bit
    except ImportError:
        return (Linear,)
    return (Linear, Linear4bit)


def _lora_forwards() -> tuple[Callable[..., Any], ...]:
    """The forwards that `forward` stands in for. Subclasses that inherit them are covered too."""
    return tuple(layer.forward for layer in linear_layers())


def _reason_base(module: Any, base: nn.Module) -> str | None:
    """Why the base layer is not one that the op can take. Looked at once, when patching."""
    weight = base._parameters.get("weight")
    if base is not module.base_layer:
        return "another tuner layer lies between it and its base layer"
    if isinstance(weight, NF4Weight) or type(base) is nn.Linear:
        return None
    if hasattr(weight, "quant_state"):
        return bitsandbytes.reason_unusable(weight)
    return f"no fused forward over a base of type {type(base).__name__}"


def _reason_adapters(module: Any, names: Sequence[str]) -> str | None:
    """Why these adapters together are nothing that an op computes, or None."""
    dropouts = module._modules["lora_dropout"]._modules
    for name in names:
        variant = module.lora_variant.get(name)
        if variant is not None:
            from peft.tuners.lora.variants import DoraLinearVariant

            if type(variant) is not DoraLinearVariant:
                return f"{type(variant).__name__.removesuffix('LinearVariant')} is not fused"
            if len(names) > 1:
                return f"DoRA beside other active adapters ({', '.join(names)})"
            magnitude = module.lora_magnitude_vector[name]
            if magnitude.fan_in_fan_out or has_hooks(magnitude):
                return "DoRA over a transposed weight, or with hooks on its magnitudes"
        if type(dropouts[name]) not in (nn.Identity, nn.Dropout):
            return f"lora_dropout is a {type(dropouts[name]).__name__}"
    return None


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the class's forward. Our own forwards do not count."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return True
    if "forward" not in module.__dict__:
        return False
    forward_ = replaced(module)
    ours = getattr(forward_, "func", None) in (forward, linear4bit.forward)
    return forward_ is not None and not ours


def _adapter(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 adapters go in as they are; bf16 adapters under fp16 activations, say, become fp32."""
    return weight if weight.dtype in (dtype, torch.float32) else weight.float()
