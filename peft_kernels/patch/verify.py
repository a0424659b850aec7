"""Tries a LoRA layer whose forward is not one that was read: ours against it, once per class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fused import Fused, Record, fuse, restore

logger = logging.getLogger("peft_kernels")

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative, of outputs and gradients: a term that is missing or scaled otherwise is off by far more."""


def lora(module: Any, active: Sequence[str], mixin: type[Fused], reason: str) -> str:
    """`reason` why a forward is not known, or "" when the layer gives the same by ours.

    A copy of the adapters is tried, with other numbers in them, over the layer's own base.
    """
    name = next(iter(active), None) or next(iter(module.lora_A), None)
    weight = getattr(module.base_layer, "weight", None)
    if name is None or weight is None or weight.device.type == "meta":
        return f"{reason}, and could not be tried on this layer"
    twin = copy.deepcopy(module, {id(module.base_layer): module.base_layer})
    restore(twin)
    twin.lora_dropout.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (twin.lora_A[name].weight, twin.lora_B[name].weight):
            part.copy_(torch.randn(part.shape, generator=generator) * part.shape[1] ** -0.5)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(2, module.in_features, generator=generator).to(weight.device, dtype)
    variant = name in module.lora_variant
    calls: list[dict[str, Any]] = [{}] if variant else [{}, {"adapter_names": [name, "__base__"]}]
    try:
        theirs = [_results(twin, name, x, call) for call in calls]
        record = Record()
        fuse(twin, mixin, record)
        ours = [_results(twin, name, x, call) for call in calls]
    except Exception as error:  # whatever another version's layer does with what it does not expect
        return f"{reason}, and a trial failed ({type(error).__name__}: {error})"
    if record.fallbacks:
        return f"{reason}, and could not be tried: {next(iter(record.fallbacks))}"
    pairs = [pair for both in zip(theirs, ours, strict=True) for pair in zip(*both, strict=True)]
    worst = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for b, a in pairs)
    if not worst <= TOLERANCE.get(dtype, 1e-3):
        return f"{reason}, and gives other results (off by {worst:.2g})"
    logger.info("%s; tried on one layer, it gives the same as the fused forward (%.2g)", reason, worst)
    return ""


def _results(layer: Any, name: str, x: Tensor, call: dict[str, Any]) -> list[Tensor]:
    """Output, and gradients of x, A and B, in fp32."""
    x = x.detach().requires_grad_()  # else bitsandbytes' evaluation on CPUs would repack the weight
    parts = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    for part in parts:
        part.requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = layer(x, **call)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
        return [
            t.float() for t in (y.detach(), *torch.autograd.grad(y, [x, *parts], dy, materialize_grads=True))
        ]
