"""PEFT models as wholes: merging back into NF4, and what in a model belongs to adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nf4 import NF4Weight
from ..nn import NF4Linear


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
