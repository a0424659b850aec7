"""Merges adapters of PEFT models, optionally back into NF4."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.packed_state import PARALLEL
from ..nf4 import bitsandbytes_format
from ..nf4.sharded.checks import is_tensor_parallel
from ..nf4.weight import PackedWeight
from ..patch.fused import plain_class
from ..patch.rules.lora import active_adapters, lora_linear_classes
from .bitsandbytes.ops import unpack


def merge_and_unload(model: Any, quantize: bool = False, safe_merge: bool = False) -> nn.Module:
    """Merges a PEFT model's active adapters and returns the base model.

    For bitsandbytes' Linear4bit the result matches the unmerged LoRA layer, unlike `model.merge_and_unload()`
    of PEFT 0.21: it scales the biases of `lora_bias=True`, and handles weights that bitsandbytes repacked
    during evaluation on a CPU.

    Parameters
    ----------
    model : peft.PeftModel
        On layers that are NF4Linear, nn.Linear, bitsandbytes' Linear4bit, or packed or dense experts.
    quantize : bool
        False makes merged NF4 weights dense. True packs them again layer by layer, so memory stays that of
        the 4-bit model. Deltas below half a quantisation step are then rounded away: a short fine-tuning can
        be lost almost completely. Merging into the 16-bit model and quantising that keeps it
        (docs/recipes/saving.md). PEFT always repacks Linear4bit, with the same loss.
    safe_merge : bool
        Check all adapters and merged weights for NaN and Inf before any layer is merged.

    Raises
    ------
    ValueError
        With `safe_merge`: NaN or Inf in an active adapter or in a merged weight or bias. With `quantize`: NaN
        or Inf in an active adapter on an NF4 weight. An adapter that is active twice.
    RuntimeError
        An adapter with `lora_bias=True` on a layer without a bias; a base weight that is split for tensor
        parallelism.

    Nothing is merged on error.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    for name, module in layers:
        if any(is_tensor_parallel(weight) for weight in module.get_base_layer()._parameters.values()):
            raise RuntimeError(f"{name}: {PARALLEL}, expected merges of a model in one process")
    packed = {name: _packed(module.get_base_layer()) for name, module in layers} if quantize else {}
    for name, module in layers:
        _check(name, module, safe_merge, bool(packed.get(name)))
    try:
        for name, module in layers:
            if packed.get(name):
                _merge_by(module, functools.partial(_merge_and_repack, module, packed[name]))
            elif _is_over_bitsandbytes(module) and (adapters := _to_merge(module)):
                unpack(module.get_base_layer())
                if any(module.lora_bias.get(adapter) for adapter in adapters):
                    _merge_by(module, functools.partial(_merge_with_bias, module))
        unloaded: nn.Module = model.merge_and_unload(safe_merge=safe_merge)
        return unloaded
    finally:
        for _, module in layers:
            vars(module).pop("merge", None)


def _packed(base: nn.Module) -> list[PackedWeight]:
    """A layer's weights that are packed, or merged with their packed bytes kept."""
    parameters: Iterable[Any] = base._parameters.values()
    weights = [weight for weight in parameters if isinstance(weight, PackedWeight)]
    return [weight for weight in weights if weight.is_merged or not weight.is_dense]


def _is_over_bitsandbytes(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    weight = module.get_base_layer()._parameters.get("weight")
    return isinstance(module, LoraLayer) and bitsandbytes_format.is_quantized(weight)


def _merge_by(module: Any, merge: Callable[..., None]) -> None:
    """Makes PEFT call `merge` instead of the layer's own, once: for DoRA a merge calls itself."""

    def instead(*args: Any, **kwargs: Any) -> None:
        del vars(module)["merge"]
        merge(*args, **kwargs)

    vars(module)["merge"] = instead


def _merge_and_repack(module: Any, weights: list[PackedWeight], *args: Any, **kwargs: Any) -> None:
    module.merge(*args, **kwargs)
    for weight in weights:
        weight.requantize_()


def _to_merge(module: Any) -> list[str]:
    return [name for name in active_adapters(module) if name not in module.merged_adapters]


def _merge_with_bias(module: Any, *_args: Any, **_kwargs: Any) -> None:
    """Merges, and then sets the correct bias.

    PEFT 0.21 omits the scaling, turns a bf16 bias into fp32, and raises with `safe_merge`; the checks were
    done before."""
    bias, merged = module.get_base_layer().bias, _merged_bias(module)
    module.merge()
    bias.data = merged


def _merged_bias(module: Any) -> Tensor:
    bias = module.get_base_layer().bias
    merged = bias.detach().float()
    for name in _to_merge(module):
        if module.lora_bias.get(name):
            merged = merged + module.scaling[name] * module.lora_B[name].bias.detach().float()
    return merged.to(bias.dtype)


@torch.no_grad()
def _merged_weight(module: Any) -> Tensor | None:
    """The weight that PEFT's merge will produce; None for layers and variants that only PEFT checks."""
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils.integrations import dequantize_bnb_weight
    from peft.utils.other import transpose

    is_linear = plain_class(module) in lora_linear_classes()
    if not is_linear and not hasattr(module, "parameter_name"):
        return None
    weight = getattr(module.get_base_layer(), _target(module))
    if is_linear and len(weight.shape) != 2:
        return None
    if hasattr(weight, "quant_state"):
        weight = dequantize_bnb_weight(weight, state=weight.quant_state)
    dtype = weight.dtype
    unmerged = merged = weight.detach().float()
    for name in _to_merge(module):
        variant, fan_in_fan_out = module.lora_variant.get(name), module.fan_in_fan_out
        delta = module.get_delta_weight(name).to(dtype).float()
        merged = merged + delta
        if variant is not None:
            if type(variant) is not DoraLinearVariant:
                return None
            magnitude = module.lora_magnitude_vector[name]
            norm = magnitude.get_weight_norm(unmerged, transpose(delta, fan_in_fan_out), scaling=1)
            merged = merged * transpose((magnitude.weight.float() / norm).view(-1, 1), fan_in_fan_out)
    return merged.to(dtype)


def _target(module: Any) -> str:
    """Name of the base layer's adapted parameter, which PEFT's `target_parameters` may select."""
    return str(getattr(module, "parameter_name", "weight"))


def _check(name: str, module: Any, safe_merge: bool, packs: bool) -> None:
    """Raises what a merge of the layer would, but before anything is merged."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import onload_layer

    if isinstance(module, LoraLayer):
        _check_biases(name, module)
    if safe_merge or packs:  # NaN has no code in NF4
        with onload_layer(module):
            _check_adapters(name, module)
            if safe_merge and isinstance(module, LoraLayer):
                _check_merged(name, module)


def _check_biases(name: str, module: Any) -> None:
    """Raises PEFT's error for a missing bias, but before anything is merged."""
    adapters = [adapter for adapter in _to_merge(module) if module.lora_bias.get(adapter)]
    if adapters and getattr(module.get_base_layer(), "bias", None) is None:
        raise RuntimeError(
            f"{name}: impossible to merge adapter {adapters[0]}, which has lora_bias=True: the base layer "
            "has no bias; nothing is merged"
        )


def _check_merged(name: str, module: Any) -> None:
    """Raises ValueError for NaN or Inf after merging: finite adapters can overflow fp16, or the base may be
    bad."""
    base, adapters = module.get_base_layer(), _to_merge(module)
    if not adapters:
        return
    if bitsandbytes_format.is_quantized(getattr(base, "weight", None)):
        unpack(base)
    merged = {_target(module): _merged_weight(module)}
    if any(module.lora_bias.get(adapter) for adapter in adapters):
        merged["bias"] = _merged_bias(module)
    for key, value in merged.items():
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{name}.{key}: expected finite values after merging {', '.join(adapters)}, got NaN or Inf; "
                "nothing is merged"
            )


def _check_adapters(name: str, module: Any) -> None:
    for key, parameter in module.named_parameters():
        path = key.split(".")
        if path[0] == "base_layer" or set(path).isdisjoint(module.active_adapters):
            continue
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name}.{key}: expected finite values, got NaN or Inf; nothing is merged")
