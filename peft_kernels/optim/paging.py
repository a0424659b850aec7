"""Steps with moments in host memory: splitting into chunks, and the order of copies and computation.

Each chunk is copied to a buffer on the device, updated there by the op and copied back. Three buffers let one
chunk compute while the next is copied in and the previous one out: PCIe is full duplex. Events order the
queues. The host waits in one place: a step begins when the previous one is back in host memory, so two steps
never hold buffers at once; the device still has that step's forward and backward to run.

This file does not depend on CUDA: `Streams` is the interface of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.optim import STATE_BLOCK

SLOTS = 3
"""Buffers: one copied in, one computed with, one copied out."""
ALIGN = 256
"""Alignment in bytes of tensors in a buffer."""
CURRENT, IN, OUT = "current", "in", "out"
"""Queues: the stream on which the step is called, and one for copies in each direction."""

DEFAULT_BUDGET = 128 << 20
"""Bytes. A chunk of 40 MB takes 2 ms over PCIe and 0.1 ms to launch; larger ones gain nothing."""
SMALLEST_BUDGET = SLOTS * 3 * STATE_BLOCK * 4
"""Bytes for one block of each paged tensor of a parameter."""


class Streams(Protocol):
    """Queues of a device (work runs in order within a queue) and its memory."""

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in pinned host memory."""

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor is in pinned host memory."""

    def refuse(self) -> str | None:
        """Why a step cannot run now, or None."""

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
    """Consecutive pieces; the first and last may be partial."""

    first: int
    parts: list[tuple[int, int]]  # elements from, to; of pieces first, first + 1, ...
    nbytes: int


def split_to_chunks(pieces: Sequence[Piece], budget: int) -> list[Chunk]:
    """Splits pieces, in order, into chunks of which SLOTS fit into the budget.

    A piece larger than a buffer is split at multiples of STATE_BLOCK. Raises ValueError if it must stay
    whole."""
    buffer_bytes = budget // SLOTS // ALIGN * ALIGN
    chunks: list[Chunk] = []
    first, parts, used = 0, list[tuple[int, int]](), 0
    for at, piece in enumerate(pieces):
        start = 0
        while True:
            stop = piece.numel
            if used + nbytes_of(piece, stop - start) > buffer_bytes:
                if parts:
                    chunks.append(Chunk(first, parts, used))
                    first, parts, used = at, [], 0
                if nbytes_of(piece, stop - start) > buffer_bytes:
                    stop = start + buffer_bytes // sum(piece.paged) // STATE_BLOCK * STATE_BLOCK
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
    """Bytes of a piece in a buffer, aligned."""
    return sum(-(-numel * size // ALIGN) * ALIGN for size in piece.paged)


class Ring:
    """The buffers of a device, with the order of copies and computation."""

    def __init__(self, streams: Streams, budget: int) -> None:
        self.streams, self.budget = streams, budget
        self._written: Any = None

    def run(self, chunks: Sequence[list[Tensor]], compute: Callable[[int, list[Tensor]], Any]) -> None:
        """Copies each chunk's host tensors to the device, calls compute(number, device tensors), which
        launches on CURRENT, and copies them back.

        Buffers exist only during a step, when there are no activations. They are allocated first: an
        out-of-memory error changes nothing.
        """
        self.synchronize()
        streams, used = self.streams, max(map(_nbytes, chunks), default=0)
        buffers = streams.empty(min(SLOTS, len(chunks)), used) if used else []
        gone: list[Any] = [None] * len(buffers)
        if buffers:
            streams.wait(IN, streams.record(CURRENT))  # of earlier users of the memory
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
        """Waits until everything is written back, before the host reads, copies or frees it."""
        if self._written is not None:
            self.streams.synchronize(self._written)
            self._written = None


def _nbytes(host: Sequence[Tensor]) -> int:
    return sum(-(-t.nbytes // ALIGN) * ALIGN for t in host)


def _placed(host: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
    """Views of the same sizes in a buffer."""
    found, at = [], 0
    for t in host:
        found.append(buffer[at : at + t.nbytes].view(t.dtype))
        at += -(-t.nbytes // ALIGN) * ALIGN
    return found


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for a, b in zip(to, source, strict=True):
        a.copy_(b, non_blocking=True)
