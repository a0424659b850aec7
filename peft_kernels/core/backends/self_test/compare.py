"""Compares the results of an op and its gradients with its reference in plain torch, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ... import registry
from ...op import OPS, Op
from .cases import CASES, Values

Faults = dict[str, str]
"""By the name of a kernel. A test enters each kernel as UNFINISHED before it runs it."""
UNFINISHED = "it does not end"

RMS, ELEMENT = 2.0, 8.0
"""Errors that are allowed, in units of rounding: the RMS error relative to the result's RMS, and that of an
element relative to the RMS and its own size."""
SUMS = 16 * torch.finfo(torch.float32).eps
"""The least unit: sums of hundreds of terms in fp32, of which some cancel out."""
TF32 = 2.0**-10
"""The least unit where torch's matmuls, which fp32 activations run on, may round their factors."""
CODES = 2
"""Bytes of codes that may differ: torch's kernels may round a quotient otherwise."""


def fault_of(op: str, namespace: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with an op of a back end on a device, for activations of a dtype; None if nothing is."""
    call = registry.eager(getattr(getattr(torch.ops, namespace), op).default)
    faults = (fault(OPS[op], call, args, dtype) for args in CASES[op](Values(device, dtype)))
    return next(filter(None, faults), None)


def fault(op: type[Op], call: Callable[..., Any], args: Any, dtype: torch.dtype) -> str | None:
    """What is wrong with the results of `call`, or with gradients by it; None if nothing is.

    Parameters
    ----------
    call
        The op of the back end under test, as `registry.eager` returns it.
    args
        All arguments; tensors are copied.
    dtype
        Of the activations: that of the largest rounding errors.
    """
    # The optimizer's states are rounded to codes, and its reference computes as the kernel does.
    is_exact = any(tensor.dtype == torch.uint8 for tensor in _changed(op, args))
    truth = results(op, op.plain, args, lambda t: t if is_exact else t.double(), op.differentiable)
    try:
        # Kernels of their own compute the gradient of x alone.
        counts = (None, 1) if op.differentiable else (None,)
        several = [results(op, call, args, lambda t: t, op.differentiable[:n]) for n in counts]
    except torch.OutOfMemoryError:
        raise  # this says nothing of the kernel
    except RuntimeError as error:  # it could not be launched
        return " ".join(str(error).split())
    if missing := truth.keys() - several[0].keys():
        return f"no {', '.join(sorted(missing))}"
    for found in several:
        for name, got in found.items():
            if (wrong := _difference(got, truth[name], dtype)) is not None:
                return f"{name}: {wrong}"
    return None


def results(
    op: type[Op],
    call: Callable[..., Any],
    args: Any,
    convert: Callable[[Tensor], Tensor],
    trained: Sequence[str],
) -> dict[str, Tensor]:
    """All tensors that a call returns or changes, and the gradients of the arguments in `trained`."""
    given = [
        tree_map(partial(_copy, name, convert, name in trained), value)
        for name, value in zip(op.arguments, args, strict=True)
    ]
    if "dtype" in op.arguments:  # the result's
        place = op.arguments.index("dtype")
        given[place] = convert(torch.empty(0, dtype=given[place])).dtype
    returned = call(*given)
    if op.full_schema().endswith("-> ()"):
        return {f"change {i}": t for i, t in enumerate(_changed(op, given))}
    named = returned if len(op.returns) > 1 else (returned,)
    found: dict[str, Tensor] = {}
    for name, result in zip(op.returns or ["result"], named, strict=True):
        found |= {f"{name}{_number(result, j)}": t.detach() for j, t in enumerate(tree_leaves(result))}
    outputs = [t for result in named[: op.num_outputs] for t in tree_leaves(result) if t.numel()]
    return found | _gradients(op, given, outputs)


def _copy(name: str, convert: Callable[[Tensor], Tensor], is_trained: bool, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if name in _PACKED or not leaf.is_floating_point():
        return leaf.clone()
    return convert(leaf.clone()).detach().requires_grad_(is_trained)


def _gradients(op: type[Op], given: Sequence[Any], outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    leaves = [(name, t) for name, value in zip(op.arguments, given, strict=True) for t in tree_leaves(value)]
    inputs = [(name, t) for name, t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if not inputs:
        return {}
    tensors, cotangents = [t for _, t in inputs], [_cotangent(t) for t in outputs]
    computed = torch.autograd.grad(outputs, tensors, cotangents, allow_unused=True)
    return {
        f"gradient of {name} ({i})": gradient
        for i, ((name, _), gradient) in enumerate(zip(inputs, computed, strict=True))
        if gradient is not None
    }


_PACKED = frozenset(("absmax", "absmax1", "absmax2", "offset", "q8"))
"""Scales: with the codes they define the weight, and stay as they are."""


def _number(result: Any, index: int) -> str:
    return f"[{index}]" if isinstance(result, (list, tuple)) else ""


def _changed(op: type[Op], args: Any) -> Iterator[Tensor]:
    """The tensors that an op changes in place."""
    declared = op.full_schema()[1:].split(", ")
    for text, value in zip(declared, args, strict=False):
        if "!)" in text:
            yield from tree_leaves(value)


def _cotangent(output: Tensor) -> Tensor:
    """The gradient of an output: the same values for any dtype of at least 16 bits."""
    values = Values(output.device, torch.bfloat16).normal(output.numel())
    return values.view(output.shape).to(output.dtype)


def _rounds_factors() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by torch's other interface, whose getter older releases lack
        return True


def _difference(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    if got.shape != expected.shape:
        return f"has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not got.is_floating_point():
        differs = (got.long() - expected.long()).abs()
        wrong = int((differs > 0).sum())
        return None if wrong <= CODES else f"{wrong} of {got.numel()} codes differ"
    if not got.numel():
        return None
    unit = max(TF32 if _rounds_factors() else SUMS, torch.finfo(got.dtype).eps, torch.finfo(dtype).eps)
    got, expected = got.double(), expected.double()
    error, size = (got - expected).abs(), float(expected.pow(2).mean().sqrt())
    rms = float(error.pow(2).mean().sqrt())
    excess = float((error - ELEMENT * unit * (expected.abs() + size)).max())
    if rms <= RMS * unit * size and excess <= 0:  # not if either is NaN
        return None
    return f"differs by {float(error.max()):.3g} (RMS {rms:.3g}) where the RMS is {size:.3g}"
