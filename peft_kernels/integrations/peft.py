"""PEFT's LoRA layers on our kernels, and merging back into NF4."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import lora_linear
from ..nf4 import NF4Weight
from ..nn import NF4Linear
from . import bitsandbytes, linear4bit
from .forward import replaced


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
    active = [name for name in module.active_adapters if name in module.lora_A]
    reasons = {r for r in (_reason_adapter(module, name, training=True) for name in active) if r is not None}
    if len(active) > 1:
        reasons.add(_several(active))
    return kind, lora_forward, "; ".join(sorted(f"{reason}: original forward" for reason in reasons))


def lora_forward(module: Any, x: Tensor, *args: Any, fallbacks: Counter[str], **kwargs: Any) -> Tensor:
    """`LoraLayer.forward` for one plain adapter over a linear base, base product and delta in one op."""
    base = module.base_layer
    if module.disable_adapters or module.merged:
        return type(module).forward(module, x, *args, **kwargs)  # the base layer alone, as it is meant to be
    active = [name for name in module.active_adapters if name in module.lora_A]
    reason = _reason_call(module, base, x, active, args, kwargs)
    if reason is not None:
        fallbacks[reason] += 1
        return type(module).forward(module, x, *args, **kwargs)
    if not active:
        return base(x)

    name = active[0]
    out_dtype, weight = x.dtype, base.weight
    if hasattr(weight, "quant_state"):
        weight = linear4bit.as_nf4(base)
        x = x.to(linear4bit.compute_dtype(base, x))  # and back: Linear4bit answers in the type of its input
    elif torch.is_autocast_enabled(x.device.type):
        out_dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(out_dtype)
        if not isinstance(weight, NF4Weight):
            weight = weight.to(out_dtype)
    bias = None if base.bias is None else base.bias.to(x.dtype)
    lora_a, lora_b = (_adapter(adapters[name].weight, x.dtype) for adapters in (module.lora_A, module.lora_B))
    return lora_linear(x, weight, lora_a, lora_b, module.scaling[name], bias).to(out_dtype)


def merge_and_unload(model: Any, quantize: bool = False, safe_merge: bool = False) -> nn.Module:
    """Merge a PEFT model's active LoRA adapters and return the base model.

    Parameters
    ----------
    model : peft.PeftModel
        Over layers that are NF4Linear, nn.Linear, or both.
    quantize : bool
        False: as `model.merge_and_unload()`, every layer that gets a delta becomes dense. True: NF4 layers
        are packed again one by one, so memory stays that of the 4-bit model; what is finer than the NF4 grid
        is lost.
    safe_merge : bool
        Check the merged weights for NaN, as PEFT does.

    Raises
    ------
    ValueError
        With `quantize`: an active adapter has NaN or Inf. Nothing is merged then.
    """
    if not quantize:
        return model.merge_and_unload(safe_merge=safe_merge)
    from peft.tuners.lora import LoraLayer

    packed: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and isinstance(base := module.get_base_layer(), NF4Linear)
        and isinstance(base.weight, NF4Weight)
    ]
    for name, module in packed:
        _check_adapters(name, module)  # NaN has no code: found now, and not with half of the model merged
    for name, module in packed:
        base = module.get_base_layer()
        blocksize, double_quant = base.weight.blocksize, base.weight.double_quant
        module.merge(safe_merge=safe_merge)
        if isinstance(base.weight, NF4Weight):
            continue  # no active adapter on this layer
        module.base_layer = NF4Linear.from_linear(base, blocksize, double_quant, name=f"{name}.weight")
    # Layers merged above are not merged twice: PEFT passes over adapters that are merged already.
    return model.merge_and_unload(safe_merge=safe_merge)


def adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What PEFT has added to a model and may train: everything inside its layers but the layers they wrap."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for name, child in module.named_children():
                if name not in ("base_layer", "original_module"):
                    yield from child.modules()


def _check_adapters(name: str, module: Any) -> None:
    for key, parameter in module.named_parameters():
        path = key.split(".")
        if path[0] == "base_layer" or set(path).isdisjoint(module.active_adapters):
            continue
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name}.{key}: expected finite values, got NaN or Inf; nothing is merged")


def _lora_forwards() -> tuple[Callable[..., Any], ...]:
    """The forwards that `lora_forward` stands in for. Subclasses that inherit them are covered too."""
    from peft.tuners.lora import Linear

    forwards: tuple[Callable[..., Any], ...] = (Linear.forward,)
    try:
        from peft.tuners.lora import Linear4bit  # there only with bitsandbytes
    except ImportError:
        return forwards
    return (*forwards, Linear4bit.forward)


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


def _reason_adapter(module: Any, name: str, training: bool) -> str | None:
    """Why this adapter is not a plain LoRA, or None."""
    if name in module.lora_variant:
        return (
            type(module.lora_variant[name]).__name__.removesuffix("LinearVariant")
            + " is not fused in this version"
        )
    dropout = module.lora_dropout[name]
    if training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        return f"lora_dropout={getattr(dropout, 'p', '?')} in training is not fused in this version"
    if module.lora_B[name].bias is not None:
        return "lora_bias=True is not fused in this version"
    return None


def _several(active: list[str]) -> str:
    return f"{len(active)} active adapters ({', '.join(active)}) are not fused in this version"


def _reason_call(
    module: Any, base: Any, x: Tensor, active: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why this call has to take the original forward, or None."""
    if args or any(value is not None for value in kwargs.values()):
        return f"extra arguments ({', '.join(kwargs) or 'positional'})"
    if len(active) > 1:
        return _several(active)
    parts = [
        base,
        *(part[name] for name in active for part in (module.lora_A, module.lora_B, module.lora_dropout)),
    ]
    if any(_has_hooks(part) for part in parts):
        return "hooks on the base layer or an adapter, which a fused forward would pass by"
    for name in active:
        reason = _reason_adapter(module, name, module.lora_dropout[name].training)
        if reason is not None:
            return reason
    weight = base.weight
    autocast = torch.is_autocast_enabled(x.device.type)
    if hasattr(weight, "quant_state"):
        dtype = linear4bit.compute_dtype(base, x)
        if not autocast and torch.promote_types(x.dtype, dtype) != dtype:
            # PEFT computes the delta in the adapter's type, from x as it is; the op would from x in `dtype`.
            return f"x is {x.dtype}, the base layer computes in {dtype}"
        return bitsandbytes.reason_unusable(weight) or linear4bit._reason_shape(base, x)
    if not isinstance(weight, NF4Weight) and type(weight) is not nn.Parameter:
        return f"the base weight is a {type(weight).__name__}"
    if not isinstance(weight, NF4Weight) and weight.dtype != x.dtype and not autocast:
        return f"x is {x.dtype}, the base weight {weight.dtype}"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the class's forward. Our own Linear4bit forward does not count."""
    forward = replaced(module)
    return bool(
        (forward is not None and getattr(forward, "func", None) is not linear4bit.forward)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _adapter(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 adapters go in as they are; bf16 adapters under fp16 activations, say, become fp32."""
    return weight if weight.dtype in (dtype, torch.float32) else weight.float()
