"""Trials of layers with their own weights: random inputs, and random values in a copy of the adapters.

They take the time of a few rows, and cannot run on weights that are sharded or on the meta device. They do
not see what their input does not reach: an option that is off, side effects, long inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.module_calls import hooks_on_all
from ...nf4.experts_forward import experts_forward, weight_names
from ...ops.arguments import no_autocast
from ..fused import Fused, Record, fuse, plain_class, restore
from .verdict import CannotTry, Differs

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative, for outputs and gradients: a term that is missing or scaled differently is off by far more."""

_NOT_LOADED = "its weights are not loaded, or it has no adapter; load them first"


def lora(module: Any, active: Sequence[str], mixin: type[Fused]) -> None:
    """Compares a LoRA layer with what `mixin` computes.

    Runs a copy of the adapters with random values over the layer's own base.
    """
    name = next(iter(active), None) or next(iter(module.lora_A), None)
    weight = getattr(module.base_layer, "weight", None)
    if name is None or weight is None or weight.device.type == "meta":
        raise CannotTry(_NOT_LOADED)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = random_rows(2, module.in_features, weight.device, dtype)
    variant = name in module.lora_variant
    calls: list[dict[str, Any]] = [{}] if variant else [{}, {"adapter_names": [name, "__base__"]}]

    def parts(twin: Any) -> list[Tensor]:
        twin.lora_dropout.eval()
        return [twin.lora_A[name].weight, twin.lora_B[name].weight]

    def run(twin: Any) -> list[Tensor]:
        return [t for call in calls for t in results(twin, (x,), parts(twin), **call)]

    _compare_fused(module, module.base_layer, mixin, parts, run, dtype)


def parameters(wrappers: Sequence[Any], mixin: type[Fused]) -> None:
    """As `lora`, for PEFT's wrappers around one module, from the outermost on."""
    module = wrappers[-1].base_layer
    name = next((name for wrapper in wrappers for name in wrapper.lora_A), None)
    inputs = _routed(module)
    if name is None or inputs[0].device.type == "meta":
        raise CannotTry(_NOT_LOADED)

    def parts(twin: Any) -> list[Tensor]:
        return [p for key, p in twin.named_parameters() if f".{name}." in f".{key}." and "lora_" in key]

    def run(twin: Any) -> list[Tensor]:
        return results(twin, inputs, parts(twin))

    _compare_fused(wrappers[0], module, mixin, parts, run, inputs[0].dtype)


def experts(module: Any) -> None:
    """Compares experts of transformers with `experts_forward`: a few tokens, routed to two experts, with the
    module's own weights."""
    if hooked := hooks_on_all():
        raise CannotTry(hooked)
    inputs = _routed(module)
    if inputs[0].device.type == "meta":
        raise CannotTry("its weights are on the meta device; load them")
    theirs, ours = (
        results(partial(run, module), inputs, []) for run in (plain_class(module).forward, experts_forward)
    )
    if not all(0 < float(t.norm()) < float("inf") for t in theirs):
        raise CannotTry("its weights are not loaded; load them")
    compare(ours, theirs, inputs[0].dtype)


def _compare_fused(
    module: Any,
    base: Any,
    mixin: type[Fused],
    parts: Callable[[Any], list[Tensor]],
    run: Callable[[Any], list[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Compares a copy of `module` over the same base, with random values in its `parts`, before and after it
    is fused."""
    if hooked := hooks_on_all():
        raise CannotTry(hooked)
    record, generator = Record(), torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module, {id(base): base})
    restore(twin)
    with torch.no_grad():
        for part in parts(twin):
            values = torch.randn(part.shape, generator=generator, device="cpu")
            part.copy_(values * part.shape[1] ** -0.5)
    theirs = run(twin)
    fuse(twin, mixin, record)
    ours = run(twin)
    if record.fallbacks:
        raise CannotTry(next(iter(record.fallbacks)))
    compare(ours, theirs, dtype)


def results(
    forward: Any, inputs: Sequence[Tensor], parts: Sequence[Tensor] = (), **kwargs: Any
) -> list[Tensor]:
    """Output, and gradients of the first input and of the parts, in fp32."""
    x, *others = inputs
    for part in parts:
        part.requires_grad_()
    with torch.inference_mode(False), torch.enable_grad(), no_autocast(x.device.type):
        # bitsandbytes repacks the weight on CPUs if nothing requires a gradient.
        x = x.detach().clone().requires_grad_()
        y = forward(x, *others, **kwargs)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
        gradients = torch.autograd.grad(y, [x, *parts], dy, materialize_grads=True)
        return [t.float() for t in (y.detach(), *gradients)]


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises Differs if a tensor is off by more than rounding in `dtype`, or has a NaN."""
    errors = [(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(got, expected, strict=True)]
    worst = float(torch.stack([error.cpu() for error in errors]).max())
    if not worst <= _TOLERANCE.get(dtype, 1e-3):
        raise Differs(f"off by {worst:.2g}")


def random_rows(rows: int, features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, features, generator=generator, device="cpu").to(device, dtype)


def _routed(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Three tokens, each routed to the first and the last expert, and the weights of the experts."""
    weight = getattr(module, weight_names(module)[0])
    features = weight.shape[1 if getattr(module, "is_transposed", False) else 2]
    x = random_rows(3, features, weight.device, weight.dtype)
    index = torch.tensor([sorted({0, weight.shape[0] - 1})], device=x.device).repeat(3, 1)
    weights = random_rows(3, index.shape[1], x.device, x.dtype).abs() + 0.5
    return x, index, weights
