"""Whether a module still runs the forward of its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def replaced(module: nn.Module) -> Callable[..., Any] | None:
    """The forward set on the instance (by `patch`, or by an accelerate hook), or None.

    A removed accelerate hook leaves the class's own forward behind, bound; that does not count.
    """
    forward: Callable[..., Any] | None = module.__dict__.get("forward")
    return None if getattr(forward, "__func__", None) is type(module).forward else forward
