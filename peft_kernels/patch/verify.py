"""Compares a fused forward with one whose source is not known, on random input, once per class.

The sources (`sources.py`) are checked first: a trial cannot see what its input does not reach (an option that
is off, dropout, side effects, long inputs), and cannot run on weights that are sharded or on the meta device.
It is used for PEFT's layers only, where a fused forward would otherwise stop working with each release, and
for experts, whose classes differ from model to model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.module_calls import hooks_on_all
from ..nf4.experts_forward import experts_forward
from ..ops.arguments import no_autocast
from .fused import Fused, Record, fuse, plain_class, restore

logger = logging.getLogger("peft_kernels")

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative, for outputs and gradients: a term that is missing or scaled differently is off by far more."""


def once(reasons: dict[tuple[Any, ...], str], key: tuple[Any, ...], find: Callable[[], str]) -> str:
    """The result of `find`, a trial for all modules of a class, stored under `key`."""
    reasons[key] = ""  # during the trial itself
    found = reasons[key] = find()
    if found and hooks_on_all():  # these prevent the trial
        del reasons[key]
    return found


def lora(module: Any, active: Sequence[str], mixin: type[Fused], reason: str) -> str:
    """`reason` why the forward of a LoRA layer is not known, or "" if `mixin` computes the same.

    Runs a copy of the adapters with random values over the layer's own base.
    """
    name = next(iter(active), None) or next(iter(module.lora_A), None)
    weight = getattr(module.base_layer, "weight", None)
    if name is None or weight is None or weight.device.type == "meta":
        return f"{reason}, and could not be tried on this layer; load its weights and an adapter first"
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(2, module.in_features, generator=torch.Generator().manual_seed(1)).to(
        weight.device, dtype
    )
    variant = name in module.lora_variant
    calls: list[dict[str, Any]] = [{}] if variant else [{}, {"adapter_names": [name, "__base__"]}]

    def parts(twin: Any) -> list[Tensor]:
        twin.lora_dropout.eval()
        return [twin.lora_A[name].weight, twin.lora_B[name].weight]

    def results(twin: Any) -> list[Tensor]:
        return [t for call in calls for t in _results(twin, (x,), parts(twin), **call)]

    return _trial(module, module.base_layer, mixin, parts, results, dtype, reason)


def parameters(wrappers: Sequence[Any], mixin: type[Fused], reason: str) -> str:
    """As `lora`, for PEFT's wrappers around one module, from the outermost on."""
    module = wrappers[-1].base_layer
    name = next((name for wrapper in wrappers for name in wrapper.lora_A), None)
    inputs = _routed(module)
    if name is None or inputs[0].device.type == "meta":
        return f"{reason}, and could not be tried on this layer; load its weights and an adapter first"

    def parts(twin: Any) -> list[Tensor]:
        return [p for key, p in twin.named_parameters() if f".{name}." in f".{key}." and "lora_" in key]

    def results(twin: Any) -> list[Tensor]:
        return _results(twin, inputs, parts(twin))

    return _trial(wrappers[0], module, mixin, parts, results, inputs[0].dtype, reason)


def experts(module: Any) -> tuple[str, bool]:
    """Why `experts_forward` does not compute what experts of transformers do, or "", and whether this could
    be tried. Sends a few tokens to two experts, with the module's own weights."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    inputs = _routed(module)
    x = inputs[0]
    if x.device.type == "meta":
        return f"{name} could not be tried, its weights are on the meta device; load them", False
    if hooked := hooks_on_all():
        return f"{name} could not be tried: {hooked}", False
    try:
        theirs, ours = (
            _results(lambda *args, run=run: run(module, *args), inputs, [])
            for run in (plain_class(module).forward, experts_forward)
        )
    except Exception as error:  # an unknown forward may raise anything
        return f"{name}: a trial failed ({type(error).__name__}: {error}); nothing to do", True
    if not all(0 < float(t.norm()) < float("inf") for t in theirs):
        return f"{name} could not be tried, its weights are not loaded; load them", False
    worst = _worst(ours, theirs)
    return (
        ""
        if worst <= _TOLERANCE[x.dtype]
        else f"{name} gives other results (off by {worst:.2g}); nothing to do"
    ), True


def _trial(
    module: Any,
    base: Any,
    mixin: type[Fused],
    parts: Callable[[Any], list[Tensor]],
    results: Callable[[Any], list[Tensor]],
    dtype: torch.dtype,
    reason: str,
) -> str:
    """Compares `results` of a copy of `module` over the same base, with random values in its `parts`, before
    and after it is fused. Returns `reason`, with what the trial found, unless they agree."""
    if hooked := hooks_on_all():
        return f"{reason}, and could not be tried: {hooked}"
    record, generator = Record(), torch.Generator().manual_seed(0)
    try:
        twin = copy.deepcopy(module, {id(base): base})
        restore(twin)
        with torch.no_grad():
            for part in parts(twin):
                part.copy_(torch.randn(part.shape, generator=generator) * part.shape[1] ** -0.5)
        theirs = results(twin)
        fuse(twin, mixin, record)
        ours = results(twin)
    except Exception as error:  # an unknown forward may raise anything
        return (
            f"{reason}, and a trial failed ({type(error).__name__}: {error}); nothing to do with this version"
        )
    if record.fallbacks:
        return f"{reason}, and could not be tried: {next(iter(record.fallbacks))}"
    worst = _worst(ours, theirs)
    if not worst <= _TOLERANCE.get(dtype, 1e-3):
        return f"{reason}, and gives other results (off by {worst:.2g}); nothing to do with this version"
    logger.info("%s; tried on one layer, the fused forward gives the same (%.2g)", reason, worst)
    return ""


def _results(forward: Any, inputs: Sequence[Tensor], parts: Sequence[Tensor], **kwargs: Any) -> list[Tensor]:
    """Output, and gradients of the first input and of the parts, in fp32."""
    x, *others = inputs
    x = x.detach().requires_grad_()  # bitsandbytes repacks the weight on CPUs if nothing requires a gradient
    for part in parts:
        part.requires_grad_()
    with torch.enable_grad(), no_autocast(x.device.type):
        y = forward(x, *others, **kwargs)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
        gradients = torch.autograd.grad(y, [x, *parts], dy, materialize_grads=True)
        return [t.float() for t in (y.detach(), *gradients)]


def _routed(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Three tokens, each routed to the first and the last expert, and the weights of the experts."""
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
