"""What an engine knows of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .layers import Rows
from .request import Request
from .store import Resident


@dataclass
class Running:
    """A request in a slot of the batch."""

    request: Request
    adapter: Resident | None
    cache: Any

    @property
    def length(self) -> int:
        """Of what is in the cache: all but the last token."""
        return len(self.request.prompt) + len(self.request.tokens) - 1


class Batch(NamedTuple):
    """What a composition of the batch needs in each step, made once."""

    adapters: list[Resident | None]
    rows: Rows
    bottlenecks: Any
