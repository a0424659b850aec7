"""The result of examining a module, shared by all kinds of fused forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..fused import Fused


@dataclass
class Examination:
    """Result of examining a module: the class to install, or why not."""

    kind: str
    mixin: type[Fused] | None
    """None: the module is fused as it is, or cannot be."""
    reason: str
    """Why the original forward would run in the present state, or ""."""
    facts: Any = None

    @classmethod
    def of(
        cls, family: str, module: nn.Module, mixin: type[Fused], reason: str, facts: Any = None
    ) -> Examination:
        """Of a module that is fused only if there is no reason against it."""
        kind = f"{family} {type(module).__name__}"
        return cls(kind, None if reason else mixin, reason, None if reason else facts)


Layers = Mapping[nn.Module, Examination | None]
"""The examinations of linear layers and experts, by module, which blocks of several layers share."""
