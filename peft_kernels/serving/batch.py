"""The slots of a batch; requests join and leave between tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .decoder import Decoder
from .layers import Rows
from .request import Request
from .store import BudgetInUse, Resident, Store, bottleneck_rows


@dataclass
class Running:
    """A request in a slot."""

    request: Request
    adapter: Resident | None
    cache: Any

    @property
    def length(self) -> int:
        """Length of the cache: all tokens but the last."""
        return len(self.request.prompt) + len(self.request.tokens) - 1


class Composition(NamedTuple):
    """Adapters of the rows, prepared once for all steps with the same composition."""

    adapters: list[Resident | None]
    rows: Rows
    bottlenecks: Any


class Batch:
    """Not thread-safe.

    Parameters
    ----------
    size : int
        Number of slots.
    pad : bool
        Whether steps also compute empty slots.
    """

    def __init__(self, decoder: Decoder, store: Store, size: int, pad: bool) -> None:
        self.slots: list[Running | None] = [None] * size
        self._decoder = decoder
        self._store = store
        self._pad = pad
        self._composition: Composition | None = None

    @property
    def requests(self) -> list[Request]:
        return [one.request for one in self.slots if one is not None]

    @property
    def is_full(self) -> bool:
        return None not in self.slots

    def in_use(self) -> set[str]:
        """Names of adapters of running requests."""
        self.leave()
        return {request.adapter for request in self.requests if request.adapter is not None}

    def leave(self) -> None:
        """Frees the slots of finished requests."""
        for i, running in enumerate(self.slots):
            if running is not None and running.request.done:
                self.slots[i] = None
                self._composition = None  # it references adapters that may be evicted

    def clear(self) -> None:
        self.slots = [None] * len(self.slots)
        self._composition = None

    def join(self, request: Request) -> bool:
        """Prefills a request and gives it a free slot. Returns False if its adapter does not fit until a
        running request finishes. Other errors become the request's error."""
        try:
            running = None if request.done else self._begin(request)
        except BudgetInUse:
            if self.requests:
                return False
            raise AssertionError("unreachable: nothing is in use") from None
        except Exception as error:
            request.finish("error", error)
            running = None
        if running is not None and not request.done:
            self.slots[self.slots.index(None)] = running
        return True

    def _begin(self, request: Request) -> Running:
        name = request.adapter
        adapter = None if name is None else self._store.get(name, self.in_use())
        with bottleneck_rows(self._decoder.model, [adapter]):
            logits, cache = self._decoder.start(
                request.prompt, Rows([None if adapter is None else adapter.lora])
            )
        request.take(logits)
        return Running(request, adapter, cache)

    def decode(self) -> None:
        """Decodes a token for each request. If the step fails or is interrupted all requests end, because
        only some layers' caches have grown."""
        if not self.requests:
            return
        try:
            self._decode()
        except Exception as error:
            self._fail(error)
        except BaseException:  # Ctrl-C
            self._fail(RuntimeError("the step that computed the request was interrupted"))
            raise
        self.leave()

    def _decode(self) -> None:
        slots = self.slots if self._pad else [one for one in self.slots if one is not None]
        composition = self._composed([None if one is None else one.adapter for one in slots])
        tokens = [0 if one is None else one.request.tokens[-1] for one in slots]
        lengths = [0 if one is None else one.length for one in slots]
        caches = [None if one is None else one.cache for one in slots]
        with composition.bottlenecks:
            logits = self._decoder.step(tokens, lengths, caches, composition.rows)
        for running, row in zip(slots, logits, strict=True):
            if running is not None:
                running.request.take(row)

    def _composed(self, there: list[Resident | None]) -> Composition:
        """The composition for rows with these adapters, cached while they stay the same."""
        before = self._composition
        if (
            before is None
            or len(before.adapters) != len(there)
            or any(a is not b for a, b in zip(before.adapters, there, strict=True))
        ):
            rows = Rows([None if one is None else one.lora for one in there])
            before = self._composition = Composition(there, rows, bottleneck_rows(self._decoder.model, there))
        return before

    def _fail(self, error: Exception) -> None:
        for request in self.requests:
            request.finish("error", error)
