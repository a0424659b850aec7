"""Trials of a forward on stand-ins: modules whose parameters and children are replaced by small tensors and
simple functions.

They take milliseconds, and run whatever the state of the module: sharded, on the meta device, on a GPU. A
forward that reads anything else of its module is not recognised, since that may differ from module to module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ...ops.arguments import no_autocast

Run = Callable[[Tensor, bool], Any]
"""What a forward gives for x, and for whether its module is in training mode: tensors, or other objects in
tuples, lists and dictionaries."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative to the largest value."""


class StandIn:
    """A module for a trial of its forward. Reads of what is not replaced are recorded, writes raise."""

    def __init__(self, module: Any, replaced: dict[str, Any], training: bool = True) -> None:
        self.__dict__.update(replaced, training=training, _module=module, reads={})

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        function = getattr(value, "__func__", None)
        if function is not None and getattr(value, "__self__", None) is self._module:
            return MethodType(function, self)
        if isinstance(value, nn.modules.dropout._DropoutNd):
            return lambda x: nn.functional.dropout(x, value.p)
        if name in vars(self._module) or name in vars(self._module).get("_modules", ()):
            self.reads[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: expected a forward that changes nothing of its module")


def unwrapped(forward: Any) -> FunctionType | None:
    """The function inside transformers' own wrappers, which rename arguments or checkpoint the call. None if
    there are others."""
    while hasattr(forward, "__wrapped__"):
        if not getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers."):
            return None
        forward = forward.__wrapped__
    return forward if isinstance(forward, FunctionType) else None


class _Case(NamedTuple):
    dtype: torch.dtype
    scale: float = 1.0
    training: bool = True
    has_gradient: bool = True


_CASES = (
    _Case(torch.float64),
    _Case(torch.float64, training=False, has_gradient=False),
    _Case(torch.float64, 1e4),
    _Case(torch.float32, training=False),
    _Case(torch.bfloat16),
    _Case(torch.float16),
)


def agree(theirs: Run, ours: Run, features: int = 8) -> bool:
    """Whether two forwards give the same values, dtypes and gradients of x, (2, 3, features) on the CPU, in
    every dtype, in training and not. A forward that raises an error agrees with none."""
    for case in _CASES:
        try:
            got = _run(theirs, case, features)
        except Exception:  # an unknown forward may raise anything
            return False
        expected = _run(ours, case, features)
        with plain_mode(has_gradient=False):
            if not alike(got, expected, _TOLERANCE[case.dtype]):
                return False
    return True


def _run(forward: Run, case: _Case, features: int) -> Any:
    with plain_mode(case.has_gradient):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, features, generator=generator, dtype=torch.float64, device="cpu") * case.scale
        x = x.to(case.dtype).requires_grad_(case.has_gradient)
        found = forward(x, case.training)
        outputs = [t for t in _tensors(found) if t.requires_grad]
        if not outputs:
            return found, None
        weights = [
            torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device="cpu").view(t.shape) for t in outputs
        ]
        return found, torch.autograd.grad(outputs, x, weights, allow_unused=True)


@contextmanager
def plain_mode(has_gradient: bool = True) -> Iterator[None]:
    """No autocast, no modes (inference, fake tensors), a gradient or not, and a random state of its own."""
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.set_grad_enabled(has_gradient),
        no_autocast("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        yield


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list, dict)):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _tensors(one)


def alike(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two results have the same structure, dtypes and values, tensors within a relative tolerance."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        finite = b.detach()[b.isfinite()]
        limit = tolerance * float(finite.abs().max()) if finite.numel() else 0.0
        return same and torch.allclose(a.detach(), b.detach(), tolerance, limit, equal_nan=True)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], tolerance) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)
