"""A step whose moments are in host memory: in which chunks they come to the device, and what waits for what.

A step goes through the parameters in chunks. Each is copied into a buffer on the device, updated there by
the op, and copied back. There are three buffers, so that while one chunk is computed the next comes in and
the one before goes out: PCIe carries both directions at once. What a queue of work may not overtake is said
by events. The host waits in one place: a step begins when the one before is all in host memory again, so that
there are never two steps' buffers. The device then has that step's forward and backward to do.

Nothing here knows of CUDA: `Streams` is what a device must have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.optim import STATE_BLOCK

SLOTS = 3
"""Buffers: one comes in, one is computed with, one goes out."""
ALIGN = 256
"""Bytes, of where a tensor may begin in a buffer."""
CURRENT, IN, OUT = "current", "in", "out"
"""Queues: the stream that the step is called on, and one for copies of each direction."""

DEFAULT_BUDGET = 128 << 20
"""Bytes. Chunks of 40 MB take PCIe 2 ms and the host some 0.1 ms to start; larger ones gain nothing."""
SMALLEST_BUDGET = SLOTS * 3 * STATE_BLOCK * 4
"""Bytes: room for a block of all that there can be of a parameter."""


class Streams(Protocol):
    """A device's queues, whose work runs in order within each and otherwise in any, and its memory."""

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """In host memory that copies of IN and OUT reach without the host's help."""

    def is_host(self, tensor: Tensor) -> bool:
        """Whether it is in such memory."""

    def refuse(self) -> str | None:
        """Why no step can be made now, or None."""

    def empty(self, count: int, nbytes: int) -> list[Tensor]:
        """So many buffers of bytes on the device. CURRENT may use them at once; other queues must wait for
        what it has to do until then."""

    def free(self, buffers: list[Tensor]) -> None:
        """Take buffers back when CURRENT and OUT have done all that they have to do until now."""

    def enqueue(self, queue: str, work: Callable[[], Any]) -> None: ...

    def record(self, queue: str) -> Any:
        """An event: that a queue has done all that it has to do until now."""

    def wait(self, queue: str, event: Any) -> None:
        """What is enqueued from now on starts after that event."""

    def synchronize(self, event: Any) -> None:
        """The host waits for it."""


class Piece(NamedTuple):
    """What of a parameter is stepped as one: all of it, or what has a stream of random bits of its own."""

    numel: int
    paged: tuple[int, ...] = ()  # bytes an element of each of its tensors in host memory
    whole: bool = False  # must not be cut
    name: str = ""


class Chunk(NamedTuple):
    """Consecutive pieces; of the first and the last it may be a part."""

    first: int
    parts: list[tuple[int, int]]  # elements from, to; of pieces first, first + 1, ...
    nbytes: int


def cut(pieces: Sequence[Piece], budget: int) -> list[Chunk]:
    """All pieces in order, in chunks of which SLOTS fit into the budget.

    A piece is cut where it is larger than a buffer, at multiples of STATE_BLOCK. ValueError for one that must
    not be and is.
    """
    room = budget // SLOTS // ALIGN * ALIGN
    chunks: list[Chunk] = []
    first, parts, used = 0, list[tuple[int, int]](), 0
    for at, piece in enumerate(pieces):
        start = 0
        while True:
            stop = piece.numel
            if used + nbytes_of(piece, stop - start) > room:
                if parts:
                    chunks.append(Chunk(first, parts, used))
                    first, parts, used = at, [], 0
                if nbytes_of(piece, stop - start) > room:
                    stop = start + room // sum(piece.paged) // STATE_BLOCK * STATE_BLOCK
                    if piece.whole or stop == start:
                        needed = SLOTS * nbytes_of(piece, piece.numel if piece.whole else STATE_BLOCK)
                        raise ValueError(
                            f"page_budget: expected at least {needed} bytes for {piece.name}, got {budget}"
                        )
            parts.append((start, stop))
            used += nbytes_of(piece, stop - start)
            start = stop
            if start == piece.numel:
                break
    if parts:
        chunks.append(Chunk(first, parts, used))
    return chunks


def nbytes_of(piece: Piece, numel: int) -> int:
    """In a buffer."""
    return sum(-(-numel * size // ALIGN) * ALIGN for size in piece.paged)


class Ring:
    """The buffers of a device, and the order of copies and computation."""

    def __init__(self, streams: Streams, budget: int) -> None:
        self.streams, self.budget = streams, budget
        self._written: Any = None

    def run(self, chunks: Sequence[list[Tensor]], compute: Callable[[int, list[Tensor]], Any]) -> None:
        """Bring in what each chunk has in host memory, call compute(number, the same on the device), which
        launches on CURRENT, and write it back.

        Buffers are there from the beginning of a step to its end alone, when activations are not. Where the
        device has no memory for them, nothing has been done.
        """
        self.synchronize()
        streams, used = self.streams, max(map(_nbytes, chunks), default=0)
        buffers = streams.empty(min(SLOTS, len(chunks)), used) if used else []
        gone: list[Any] = [None] * len(buffers)
        if buffers:
            streams.wait(IN, streams.record(CURRENT))  # what had the memory before
        try:
            for number, host in enumerate(chunks):
                if not host:
                    streams.enqueue(CURRENT, partial(compute, number, []))
                    continue
                slot = number % SLOTS
                there = _placed(host, buffers[slot])
                if gone[slot] is not None:
                    streams.wait(IN, gone[slot])
                streams.enqueue(IN, partial(_copy, there, host))
                streams.wait(CURRENT, streams.record(IN))
                streams.enqueue(CURRENT, partial(compute, number, there))
                streams.wait(OUT, streams.record(CURRENT))
                streams.enqueue(OUT, partial(_copy, host, there))
                gone[slot] = self._written = streams.record(OUT)
        finally:
            streams.free(buffers)

    def synchronize(self) -> None:
        """The host waits until all is written back: before it reads, copies or frees what is there."""
        if self._written is not None:
            self.streams.synchronize(self._written)
            self._written = None


def _nbytes(host: Sequence[Tensor]) -> int:
    return sum(-(-t.nbytes // ALIGN) * ALIGN for t in host)


def _placed(host: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
    """Of the same sizes, in a buffer."""
    found, at = [], 0
    for t in host:
        found.append(buffer[at : at + t.nbytes].view(t.dtype))
        at += -(-t.nbytes // ALIGN) * ALIGN
    return found


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for a, b in zip(to, source, strict=True):
        a.copy_(b, non_blocking=True)
