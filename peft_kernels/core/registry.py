"""The table of ops, and `install`, which defines them in a torch operator namespace.

`install(namespace)` turns the table into a torch operator namespace: the public one, and one for each back
end, so that two back ends can be compared in one process and none replaces another without a word. Gradients
call the ops of their own namespace, so a back end's backward is its own too.
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
"""Of the public ops; those of back ends begin with it. It is the package's name, which is another where
several builds may be loaded at once (Hugging Face Hub)."""
public_ops = getattr(torch.ops, NAMESPACE)

_calls: dict[OpOverload, Call] = {}


def spec_hash() -> str:
    """Fingerprint of all schemas. setup.py computes the same from the files' text and compiles it in."""
    texts = sorted(f"{op.name}{op.schema}" for op in OPS.values())
    return hashlib.sha256("\n".join([*texts, *GROUPS.values()]).encode()).hexdigest()


def eager(op: OpOverload) -> Call:
    """An op of ours for eager calls: with its gradient, and less on the way than through the dispatcher's
    keys."""
    return _calls[op]


def install(
    namespace: str, implement: Callable[[type[Op]], Call | None] | None = None
) -> torch.library.Library:
    """Define every op in `namespace`, with its fake kernel and its gradient.

    `implement(op)` gives the Python kernel, for any device; None leaves the kernel to a compiled library.
    The caller keeps the returned library alive: the ops vanish with it.
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
    flops.know(namespace, {op.name: (op.named, op.flops) for op in OPS.values() if "flops" in vars(op)})
    return library


def _fake(op: type[Op]) -> Call:
    return lambda *args: op.fake(op.named(args))


def _composed(op: type[Op], calls: Any) -> Call:
    return lambda *args: op.meaning(calls, op.named(args))
