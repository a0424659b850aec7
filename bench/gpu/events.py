"""Timing on a GPU: each turn is captured in a CUDA graph and timed by events, without Python's time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..lib.harness import MIN_TURN, Contender, Turn, first_line

MAX_CALLS = 512
"""In a turn: each kernel of each call takes a node and memory of a graph."""


def seconds(run: Callable[[], Any]) -> float:
    """Duration of `run` on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(contenders: Sequence[Contender], graphs: bool = True) -> dict[str, Turn]:
    """Turns of all contenders as graphs, or of none, so that Python's time counts for all or none."""
    counts = {contender.name: _warm_up(contender) for contender in contenders}
    if graphs:
        try:
            return {contender.name: _captured(contender, counts[contender.name]) for contender in contenders}
        except RuntimeError as error:
            torch.cuda.synchronize()
            note = f"timed without graphs: {first_line(error)}"
            for contender in contenders:
                contender.remark = partial(_joined, contender.remark, note)
    return {c.name: _turn(partial(_run, _batch(c, counts[c.name])), counts[c.name]) for c in contenders}


def _warm_up(contender: Contender) -> int:
    """Calls every copy. Returns the number of calls in a turn, at least the number of copies."""
    side = torch.cuda.Stream()  # graphs need a warm-up on a side stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run(contender.calls)
        once = statistics.median(seconds(partial(_run, contender.calls)) for _ in range(3))
    torch.cuda.current_stream().wait_stream(side)
    return _enough(len(contender.calls), len(contender.calls), once)


def _captured(contender: Contender, count: int) -> Turn:
    """A turn as a graph, captured again with more calls if most of the time measured before was Python's."""
    replay = _capture(_batch(contender, count))
    more = _enough(count, count, seconds(replay))
    if more >= 2 * count:
        replay, count = _capture(_batch(contender, more)), more
    return _turn(replay, count)


def _capture(batch: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(batch)
    graph.replay()
    return graph.replay


def _enough(least: int, calls: int, took: float) -> int:
    per_call = max(took / calls, 1e-9)
    return max(least, min(MAX_CALLS, math.ceil(MIN_TURN / per_call)))


def _batch(contender: Contender, count: int) -> list[Callable[[], Any]]:
    return list(itertools.islice(itertools.cycle(contender.calls), count))


def _turn(run: Callable[[], Any], calls: int) -> Turn:
    return lambda: seconds(run) / calls


def _run(batch: Sequence[Callable[[], Any]]) -> None:
    for call in batch:
        call()


def _joined(remark: Callable[[], str], note: str) -> str:
    return "; ".join(filter(None, (remark(), note)))


def copy_bandwidth(nbytes: int = 2**30) -> float:
    """Bytes/s read and written by the fastest of several large copies."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(10))


def matrix_peak(size: int = 8192) -> float:
    """FLOP/s of the fastest of several large bf16 GEMMs of cuBLAS."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    out = a @ b
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(10))
