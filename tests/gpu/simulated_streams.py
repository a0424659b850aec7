"""Simulates `optim.paging.Streams` without a device: work runs later, in any order a device may choose.

Whatever a device leaves undefined is as adverse as possible: a runnable queue runs at once or as late as it
can, and buffers are overwritten until the current stream owns them, and as soon as they may be reused.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels.optim import pager, plan
from peft_kernels.optim.paging import CURRENT, IN, OUT

BUDGET = 3 * 3072
"""Bytes; small enough that small parameters need several chunks."""
REUSE = "reuse"
Event = tuple[str, int]
"""A queue, and the number of its entries that must be done."""

GUARDS = ("IN after CURRENT", "IN after OUT", "CURRENT after IN", "OUT after CURRENT", "host", "free")
"""The guards that can be dropped: a queue's wait for an event of another, the host's wait, and the rule that
buffers which OUT still reads are not free."""


class SimulatedStreams:
    """order: queues by priority, or the seed of random choices. `dropped`: one of GUARDS."""

    def __init__(self, order: Sequence[str] | int = 0, dropped: str = "") -> None:
        self._order, self._random, self._dropped = order, random.Random(str(order)), dropped
        self._queues: dict[str, deque[Any]] = {queue: deque() for queue in (CURRENT, IN, OUT, REUSE)}
        self._enqueued, self._done = Counter[str](), Counter[str]()
        self._host: set[int] = set()
        self._freed: list[tuple[Event, int]] = []
        self.capturing = False
        self.most = 0
        """Peak bytes of buffers."""
        self.guarded = Counter[str]()
        """How often each of GUARDS was used."""

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = torch.zeros(*shape, dtype=dtype, device="cpu")
        self._host.add(made.untyped_storage().data_ptr())
        return made

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._host

    def refuse(self) -> str | None:
        return "captured" if self.capturing else None

    def empty(self, count: int, nbytes: int) -> list[Tensor]:
        made = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)]
        self._freed = [(event, size) for event, size in self._freed if not self._is_over(event)]
        self.most = max(self.most, count * nbytes + sum(size for _, size in self._freed))
        for buffer in made:
            self.enqueue(CURRENT, lambda buffer=buffer: buffer.fill_(0x55))
        return made

    def free(self, buffers: list[Tensor]) -> None:
        self._put(REUSE, self.record(CURRENT))
        if buffers and not self._drops("free"):
            self._put(REUSE, self.record(OUT))
            self._freed += [(self.record(OUT), buffer.nbytes) for buffer in buffers]
        for buffer in buffers:
            self._put(REUSE, lambda buffer=buffer: buffer.fill_(0x7F))

    def enqueue(self, queue: str, work: Callable[[], Any]) -> None:
        self._put(queue, work)

    def record(self, queue: str) -> Event:
        return queue, self._enqueued[queue]

    def wait(self, queue: str, event: Event) -> None:
        if not self._drops(f"{queue.upper()} after {event[0].upper()}"):
            self._put(queue, event)

    def synchronize(self, event: Event) -> None:
        if not self._drops("host"):
            while not self._is_over(event):
                self._run_one()

    def drain(self) -> None:
        """Runs everything in the queues."""
        while any(self._queues.values()):
            self._run_one()

    def _drops(self, guard: str) -> bool:
        assert guard in GUARDS
        self.guarded[guard] += 1
        return guard == self._dropped

    def _put(self, queue: str, entry: Any) -> None:
        self._queues[queue].append(entry)
        self._enqueued[queue] += 1

    def _is_over(self, event: Event) -> bool:
        return self._done[event[0]] >= event[1]

    def _run_one(self) -> None:
        queues = list(self._queues) if isinstance(self._order, int) else list(self._order)
        if isinstance(self._order, int):
            self._random.shuffle(queues)
        for queue in queues:
            if not self._queues[queue]:
                continue
            entry = self._queues[queue][0]
            if callable(entry):
                with torch.no_grad():  # like a step
                    entry()
            elif not self._is_over(entry):
                continue
            self._queues[queue].popleft()
            self._done[queue] += 1
            return
        raise AssertionError("deadlock: every queue waits for another")


@contextmanager
def simulated(order: Any = 0, dropped: str = "") -> Iterator[SimulatedStreams]:
    """Installs SimulatedStreams; parameters from 300 elements are paged, random streams have 512."""
    streams = SimulatedStreams(order, dropped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pager, "streams_of", lambda device: streams)
        patch.setattr(pager, "PAGED_FROM", 300)
        patch.setattr(plan, "STREAM", 512)
        yield streams
