"""Back end `reference`: plain torch, on any device. Slow, and right by definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import registry


class ReferenceBackend:
    name = "reference"
    namespace = f"{registry.NAMESPACE}_reference"
    device_type = None

    def __init__(self) -> None:
        self._library: torch.library.Library | None = None

    def load(self) -> None:
        if self._library is None:
            self._library = registry.install(self.namespace, lambda op: None if op.composite else op.plain)

    def probe(self) -> str | None:
        return None

    def describe(self) -> str:
        return "plain torch, any device, materialises weights"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        return None

    def has_kernel(self, op: str) -> bool:
        return False


BACKEND = ReferenceBackend()
