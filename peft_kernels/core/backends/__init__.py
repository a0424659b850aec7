"""The back ends, in the order of automatic choice."""

from __future__ import annotations

from . import cpu, cuda, reference
from .base import Backend

BACKENDS: dict[str, Backend] = {}
"""By name. `dispatch.install` fills it when the package is imported."""

__all__ = ["BACKENDS", "Backend", "cpu", "cuda", "reference"]
