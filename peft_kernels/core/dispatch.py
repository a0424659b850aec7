"""Chooses the back end that serves a call.

Automatic choice considers those in `BACKENDS` that are for the tensors' device, are usable here and support
the call. It takes the first that has kernels for the op; if none has, the first, which composes it of other
ops. A forced one (`use_backend` or the environment variable PEFT_KERNELS_BACKEND) serves the call or raises
with the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import registry
from .backends import BACKENDS, Backend
from .backends.base import tensors
from .backends.self_test import verdicts
from .op import OPS, Op

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_BACKEND"

logger = logging.getLogger("peft_kernels")

_forced: ContextVar[str | None] = ContextVar("peft_kernels_backend", default=None)
_logged: set[str] = set()
_libraries: list[torch.library.Library] = []
_chosen: dict[tuple[str, torch.device, torch.dtype], Callable[..., Any]] = {}
_has_kernel: dict[tuple[str, torch.device, torch.dtype, str | None], bool] = {}


def install(*backends: Backend) -> None:
    """Define the public ops and load the back ends, given in the order of automatic choice. Only the first
    call, at import, has an effect."""
    if _libraries:
        return
    _libraries.append(registry.install(registry.NAMESPACE, _public_kernel))
    for backend in backends:
        BACKENDS[backend.name] = backend
        backend.load()


def _public_kernel(op: type[Op]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return kernel(op.name, args)(*args)

    return call


def kernel(op: str, args: Sequence[Any]) -> OpOverload:
    """The op of the back end that serves `op` with `args`. Raises RuntimeError when a forced one cannot."""
    backend = select(op, args)
    found: OpOverload = getattr(getattr(torch.ops, backend.namespace), op).default
    return found


def call(op: str, *args: Any, like: Tensor | None = None, rounds: torch.dtype | None = None) -> Any:
    """Calls an op on the back end for the device and dtype of `like`, by default the first argument.
    `rounds`: dtype to which the op's `rounding` arguments are cast first, in one call; their gradients have
    this precision too, but are returned as fp32.

    Eager calls skip the public op and torch's autograd key; traced ones record the public op. The choice is
    cached: to examine all arguments in every call would cost a small layer as much as its arithmetic.
    """
    if torch.compiler.is_compiling():
        given = args if rounds is None else OPS[op].rounded(args, rounds)
        return getattr(registry.public_ops, op)(*given)
    like = args[0] if like is None else like
    if forced() is not None:
        return registry.eager(kernel(op, (like,)))(*args, rounds=rounds)
    key = op, like.device, like.dtype  # with its index: cards may differ
    found = _chosen.get(key)
    if found is None:
        found = registry.eager(kernel(op, (like,)))
        if verdicts.can_run():  # otherwise the kernel may not have been tested yet
            _chosen[key] = found
    return found(*args) if rounds is None else found(*args, rounds=rounds)


def has_kernel(op: str, like: Tensor) -> bool:
    """Whether a call of `op` on tensors like this one runs kernels, rather than a composition of other ops or
    plain torch. Cached, as calls of patched modules ask it."""
    key = op, like.device, like.dtype, forced()
    found = _has_kernel.get(key)
    if found is None:
        found = _has_kernel[key] = select(op, (like,)).has_kernel(op)
    return found


def select(op: str, args: Sequence[Any]) -> Backend:
    """The back end for this call. Raises RuntimeError when a forced one cannot serve it."""
    name = forced()
    if name is not None:
        backend = BACKENDS[name]
        reason = backend.probe() or backend.supports(op, args)
        if reason is not None:
            raise RuntimeError(f"back end {name} is forced but cannot serve {op}: {reason}")
        return backend
    device = next((tensor.device.type for tensor in tensors(args)), None)
    unusable: dict[str, str] = {}
    skipped = False
    composing: Backend | None = None
    for backend in BACKENDS.values():
        if backend.device_type is None:
            if composing is None and not skipped:
                _warn_of_reference(device, unusable)
            return composing or backend
        if backend.device_type != device or (composing and not backend.has_kernel(op)):
            continue
        if (reason := backend.probe()) is not None:
            unusable[backend.name] = reason
        elif (reason := backend.supports(op, args)) is not None:
            _log_once(f"back end {backend.name} skipped: {reason}")
            skipped = True
        elif backend.has_kernel(op):
            return backend
        else:
            composing = backend
    raise AssertionError("unreachable: the reference supports everything")


def _warn_of_reference(device: str | None, unusable: Mapping[str, str]) -> None:
    """Warns once per device type that plain torch serves it, and why. On the CPU the installation has
    warned."""
    if device in (None, "cpu", "meta"):
        return
    reasons = "; ".join(f"back end {name}: {reason}" for name, reason in unusable.items())
    _log_once(
        f"{device} tensors are served by plain torch (back end reference), slowly: "
        + (reasons or f"no back end has kernels for {device}")
    )


def forced() -> str | None:
    """Name of the back end forced by `use_backend` or the environment; None for automatic choice."""
    name = _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the `with` block by one back end.

    Parameters
    ----------
    name : str
        "cuda", "triton", "cpu" or "reference".

    Raises
    ------
    ValueError
        There is no back end of that name.
    RuntimeError
        It is not usable on this machine; or, inside the block, it does not support a call.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = BACKENDS[name].probe()
    if reason is not None:
        raise RuntimeError(f"back end {name} cannot be used here: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def explain() -> str:
    """Describes the back ends: whether each is built and usable here, with which instruction set or cards, or
    why not."""
    lines = []
    for backend in BACKENDS.values():
        reason = backend.probe()
        state = f"not usable: {reason}" if reason is not None else f"usable: {backend.describe()}"
        lines.append(f"{backend.name:<10} {state}")
    name = forced()
    automatic = "automatic, by the device of the tensors: the first usable one with a kernel"
    choice = f"forced: {name}" if name else automatic
    lines.append(f"{'choice':<10} {choice}")
    return "\n".join(lines)


def _log_once(sentence: str) -> None:
    if sentence not in _logged:
        _logged.add(sentence)
        logger.warning("%s", sentence)
