"""The table of ops, and `install`, which defines them in a torch operator namespace.

There is a public namespace and one per back end, so that back ends can be compared in one process and none
silently replaces another. Gradients call the ops of their own namespace, so a back end runs its own backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch._ops import OpOverload

from . import flops, gradient
from .op import GROUPS, OPS, Op

__all__ = ["NAMESPACE", "OPS", "Op", "eager", "install", "public_ops", "spec_hash"]

Call = Callable[..., Any]

NAMESPACE = __name__.partition(".")[0]
"""Namespace of the public ops and prefix of the back ends' namespaces: the package's name, which differs
where several builds can be loaded at once (Hugging Face Hub)."""
public_ops = getattr(torch.ops, NAMESPACE)

_calls: dict[OpOverload, Call] = {}


def spec_hash() -> str:
    """Hash of all schemas. setup.py computes the same from the source and compiles it into the libraries."""
    texts = sorted(f"{op.name}{op.schema}" for op in OPS.values())
    return hashlib.sha256("\n".join([*texts, *GROUPS.values()]).encode()).hexdigest()


def eager(op: OpOverload) -> Call:
    """The function for eager calls of one of our ops: differentiable, with less overhead than torch's
    dispatcher."""
    return _calls[op]


def install(
    namespace: str, implement: Callable[[type[Op]], Call | None] | None = None
) -> torch.library.Library:
    """Defines every op in `namespace`, with its fake kernel and its gradient.

    `implement(op)` returns the op's Python kernel, or None to leave it to a compiled library. The caller must
    keep the returned library alive: the ops vanish with it.
    """
    library = torch.library.Library(namespace, "DEF")
    calls = SimpleNamespace()
    for op in OPS.values():
        library.define(op.name + op.full_schema(), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{op.name}", _fake(op), lib=library)
        kernel = None if implement is None else implement(op)
        if kernel is None and op.composite:
            kernel = _composed(op, calls)
        if kernel is not None:
            library.impl(op.name, kernel, "CompositeExplicitAutograd")
        overload = getattr(getattr(torch.ops, namespace), op.name).default
        _calls[overload] = gradient.register(op, overload, library, calls)
        setattr(calls, op.name, _calls[overload])
    flops.register(namespace, {op.name: (op.named, op.flops) for op in OPS.values() if "flops" in vars(op)})
    return library


def _fake(op: type[Op]) -> Call:
    return lambda *args: op.fake(op.named(args))


def _composed(op: type[Op], calls: Any) -> Call:
    return lambda *args: op.reference(calls, op.named(args))
