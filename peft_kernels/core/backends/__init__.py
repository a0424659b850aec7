"""The back ends, in the order of automatic choice."""

from __future__ import annotations

from . import cpu, cuda, reference, triton
from .base import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, reference.BACKEND)
}

__all__ = ["BACKENDS", "Backend"]
