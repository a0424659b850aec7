"""A stub of a machine with a card: its programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Stub = Callable[..., Path]
