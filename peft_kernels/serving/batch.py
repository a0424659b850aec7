"""What an engine knows of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import adapters
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


def composition(model: Any, there: list[Resident | None], before: Batch | None) -> Batch:
    """Of a batch whose rows have these adapters; the one before, if nothing has changed."""
    if (
        before is None
        or len(before.adapters) != len(there)
        or any(a is not b for a, b in zip(before.adapters, there, strict=True))
    ):
        rows = Rows([None if one is None else one.lora for one in there])
        return Batch(there, rows, bottlenecks(model, there))
    return before


def bottlenecks(model: Any, there: Sequence[Resident | None]) -> Any:
    """A context in which rows have those of their bottleneck adapters."""
    names = [None if one is None else one.bottleneck for one in there]
    return adapters.rows(model, names) if any(names) else nullcontext()
