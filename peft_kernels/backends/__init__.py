"""The back ends, in the order of automatic choice."""

from __future__ import annotations

from . import cpu, cuda, reference
from .base import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cuda.BACKEND, cpu.BACKEND, reference.BACKEND)
}

__all__ = ["BACKENDS", "Backend"]
