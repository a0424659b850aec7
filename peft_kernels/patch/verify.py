"""Tries layers whose forward is not one that was read: ours against it, once per class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.module_calls import hooks_on_all
from ..nf4.experts_forward import experts_forward
from .fused import Fused, Record, fuse, plain_class, restore

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
    if hooked := hooks_on_all():
        return f"{reason}, and could not be tried: {hooked}"
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
    worst = _worst([t for call in ours for t in call], [t for call in theirs for t in call])
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


def experts(module: Any) -> tuple[str, bool]:
    """Why `experts_forward` does not give what experts of transformers give, or "", and whether this could be
    tried. Few tokens go to few experts, through the module's own weights."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    x, *routing = _routed(module)
    if x.device.type == "meta":
        return f"{name} could not be tried, its weights are on the meta device", False
    if hooked := hooks_on_all():
        return f"{name} could not be tried: {hooked}", False

    def results(forward: Any) -> list[Tensor]:
        x.requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = forward(module, x, *routing)
            return [t.detach().float() for t in (y, *torch.autograd.grad(y.square().sum(), x))]

    try:
        theirs = results(plain_class(module).forward)
        ours = results(experts_forward)
    except Exception as error:  # whatever foreign experts do with what they do not expect
        return f"{name}: a trial failed ({type(error).__name__}: {error})", True
    if not all(0 < float(t.norm()) < float("inf") for t in theirs):
        return f"{name} could not be tried, its weights are not loaded", False
    worst = _worst(ours, theirs)
    if not worst <= TOLERANCE[x.dtype]:
        return f"{name} gives other results (off by {worst:.2g})", True
    return "", True


def parameters(wrappers: Sequence[Any], mixin: type[Fused], reason: str) -> str:
    """As `lora`, for PEFT's wrappers around one module, from the outermost on."""
    module = wrappers[-1].base_layer
    name = next((name for wrapper in wrappers for name in wrapper.lora_A), None)
    x, *routing = _routed(module)
    if name is None or x.device.type == "meta":
        return f"{reason}, and could not be tried on this layer"
    if hooked := hooks_on_all():
        return f"{reason}, and could not be tried: {hooked}"
    twin = copy.deepcopy(wrappers[0], {id(module): module})
    restore(twin)
    generator = torch.Generator().manual_seed(0)
    parts = [p for key, p in twin.named_parameters() if f".{name}." in f".{key}." and "lora_" in key]
    with torch.no_grad():
        for part in parts:
            part.copy_(torch.randn(part.shape, generator=generator) * part.shape[1] ** -0.5)

    def results() -> list[Tensor]:
        for tensor in (x, *parts):
            tensor.requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = twin(x, *routing)
            return [t.detach().float() for t in (y, *torch.autograd.grad(y.square().sum(), [x, *parts]))]

    try:
        theirs = results()
        record = Record()
        fuse(twin, mixin, record)
        ours = results()
    except Exception as error:  # whatever another version's layer does with what it does not expect
        return f"{reason}, and a trial failed ({type(error).__name__}: {error})"
    if record.fallbacks:
        return f"{reason}, and could not be tried: {next(iter(record.fallbacks))}"
    worst = _worst(ours, theirs)
    if not worst <= TOLERANCE[x.dtype]:
        return f"{reason}, and gives other results (off by {worst:.2g})"
    logger.info("%s; tried on one module, it gives the same as the fused forward (%.2g)", reason, worst)
    return ""


def _routed(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Three tokens, each for the first and the last expert, and their weights."""
    weight = getattr(module, "gate_up_proj" if module.has_gate else "up_proj")
    generator = torch.Generator().manual_seed(0)
    features = weight.shape[1 if getattr(module, "is_transposed", False) else 2]
    x = torch.randn(3, features, generator=generator).to(weight.device, weight.dtype)
    index = torch.tensor([sorted({0, weight.shape[0] - 1})], device=x.device).repeat(3, 1)
    weights = (torch.rand(index.shape, generator=generator) + 0.5).to(x)
    return x, index, weights


def _worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error, NaN if there is one."""
    errors = [(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(got, expected, strict=True)]
    return float(torch.stack([error.cpu() for error in errors]).max())
