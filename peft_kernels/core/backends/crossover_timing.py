"""Times NF4 GEMMs fused, by wgmma where a card has it, and by dequantise + cuBLAS or, of experts, torch's
grouped GEMM, and finds for how many rows each is fastest."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .crossovers import ANY, NO_ROWS, Card, RowRange, Rows, forced
from .wgmma_check import MMA_SYNC, WGMMA

Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((1024, 4096), (4096, 4096), (14336, 4096))
"""Weights of an 8B model, from the smallest to the largest."""
FEW_ROWS = (96, 192, 384, 768)
MANY_ROWS = (2048, 4096, 8192)
"""More of them of one weight, where a card has wgmma."""
EXPERTS_SHAPES: tuple[Shape, ...] = ((1536, 2048),)
EXPERTS = 32
LEAST = 32
"""Up to this many rows, reading the weight dominates, and a fused kernel reads a quarter of the bytes."""
STEP = 32
BLOCKSIZE = 64
COPIES = 32
"""Of a weight, at most."""
SLEEP = 4_000_000
"""Clock cycles, about 2 ms."""

Clock = Callable[[Callable[[], object]], float]
"""Seconds that the device needs for the work that a function starts."""


class Cell(NamedTuple):
    """The times of one GEMM in seconds. Of a grouped GEMM: the rows and weight of an expert."""

    out_features: int
    in_features: int
    rows: int
    is_backward: bool
    fused: float
    dequantised: float
    wgmma: float | None = None
    """None: no such kernel."""

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def time_cells(
    library: Any,
    ops: Any,
    card: Card,
    device: torch.device,
    cache_bytes: int,
    clock: Clock,
    shapes: Sequence[Shape] = SHAPES,
    rows: Sequence[int] = FEW_ROWS,
    has_wgmma: bool = True,
) -> list[Cell]:
    """Times all shapes with all numbers of rows, forward and backward.

    Parameters
    ----------
    library
        The compiled library, whose crossovers for the card are changed meanwhile and then removed.
    ops
        Its namespace of torch.ops.
    cache_bytes : int
        The size of the device's L2 cache: copies of a weight that do not fit take turns.
    has_wgmma : bool
        Whether wgmma may be timed, and MANY_ROWS too.
    """
    cells = []
    random = torch.Generator(device).manual_seed(0)  # cards draw less power, and run faster, with constants
    with torch.no_grad():
        for shape in shapes:
            weights = _weights(shape, random, cache_bytes)
            with forced(library, card, WGMMA):
                takes_wgmma = has_wgmma and "wgmma" in library.plan(rows[0], *shape, BLOCKSIZE, "bfloat16")[0]
            all_rows = (*rows, *MANY_ROWS) if takes_wgmma else rows
            ways = (MMA_SYNC, DEQUANTISED, WGMMA)[: 2 + takes_wgmma]
            for m, is_backward in itertools.product(all_rows, (False, True)):
                size = m, shape[not is_backward]
                x = torch.randn(size, generator=random, dtype=torch.bfloat16, device=device)
                turn = partial(_turn, ops, x, weights, shape, is_backward)
                seconds = _times(library, card, clock, ways, turn, len(weights))
                cells.append(Cell(*shape, m, is_backward, *seconds))
    return cells


def time_experts(
    library: Any,
    ops: Any,
    card: Card,
    device: torch.device,
    clock: Clock,
    shapes: Sequence[Shape] = EXPERTS_SHAPES,
    rows: Sequence[int] = FEW_ROWS,
    has_wgmma: bool = True,
    experts: int = EXPERTS,
) -> list[Cell]:
    """Times grouped GEMMs of `experts` experts that have `rows` rows each, as `time_cells`. Empty where
    torch's grouped GEMM has no kernel for the card."""
    cells: list[Cell] = []
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for shape in shapes:
            with forced(library, card, DEQUANTISED):
                if "grouped" not in library.experts_plan(experts, experts, *shape, BLOCKSIZE, "bfloat16"):
                    continue
            with forced(library, card, WGMMA):
                plan = library.experts_plan(experts * rows[0], experts, *shape, BLOCKSIZE, "bfloat16")
            takes_wgmma = has_wgmma and "wgmma" in plan
            ways = (MMA_SYNC, DEQUANTISED, WGMMA)[: 2 + takes_wgmma]
            weights = _weights(shape, random, 0, experts)
            for m, is_backward in itertools.product(rows, (False, True)):
                size = experts * m, shape[not is_backward]
                x = torch.randn(size, generator=random, dtype=torch.bfloat16, device=device)
                ends = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * m
                turn = partial(_experts_turn, ops, x, ends, weights, shape, is_backward)
                seconds = _times(library, card, clock, ways, turn, len(weights))
                cells.append(Cell(*shape, m, is_backward, *seconds))
    return cells


DEQUANTISED = Rows(ANY, 0, 0)


def _times(
    library: Any, card: Card, clock: Clock, ways: Sequence[Rows], turn: Callable[[], object], gemms: int
) -> list[float]:
    """Times a turn of so many GEMMs each way."""
    seconds = []
    for way in ways:
        with forced(library, card, way):
            seconds.append(clock(turn) / gemms)
    return seconds


def _weights(
    shape: Shape, random: torch.Generator, cache_bytes: int, experts: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Copies of a weight, or of the weights of experts: codes and scales."""
    elements = experts * math.prod(shape)
    count = min(max(2 * cache_bytes // (elements // 2), 2), COPIES)
    size = count, elements // 2
    codes = torch.randint(256, size, generator=random, dtype=torch.uint8, device=random.device)
    scales = torch.ones(count, elements // BLOCKSIZE, dtype=torch.float32, device=random.device)
    return list(zip(codes, scales, strict=True))


def _turn(
    ops: Any, x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], shape: Shape, is_backward: bool
) -> None:
    """One GEMM with each copy of the weight."""
    for codes, scales in weights:
        base = codes, scales, None, None, BLOCKSIZE
        if is_backward:
            ops.nf4_linear_dx(x, *base, shape[1])
        else:
            ops.nf4_linear(x, *base, shape[0], None)


def _experts_turn(
    ops: Any,
    x: Tensor,
    ends: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    shape: Shape,
    is_backward: bool,
) -> None:
    """One grouped GEMM with each copy of the weights."""
    for codes, scales in weights:
        base = codes, scales, None, None, BLOCKSIZE
        if is_backward:
            ops.experts_linear_dx(x, ends, *base, shape[1])
        else:
            ops.experts_linear(x, ends, *base, shape[0], None)


def device_clock(run: Callable[[], object]) -> float:
    """The median of five times on the current CUDA stream, without Python's time."""
    run()
    seconds = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)  # work queues up behind it
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def crossovers(cells: Iterable[Cell]) -> tuple[Rows, ...]:
    """The crossovers by size of the weight, divided halfway between the sizes that were timed."""
    by_size: dict[int, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.weights):
        by_size.setdefault(cell.weights, []).append(cell)
    if not by_size:
        return ()
    sizes = list(by_size)
    ends = [math.isqrt(size * larger) for size, larger in itertools.pairwise(sizes)] + [ANY]
    found = []
    for end, group in zip(ends, by_size.values(), strict=True):
        ways = [[cell for cell in group if cell.is_backward == is_backward] for is_backward in (False, True)]
        forward, backward = map(crossover, ways)
        found.append(Rows(end, forward, backward, *map(wgmma_rows, ways, (forward, backward))))
    return tuple(found)


def crossover(cells: Iterable[Cell]) -> int:
    """The number of rows up to which to fuse, so that the GEMMs take the least time, each counted as much as
    the others. A multiple of STEP halfway between those that were timed, and none that was not reached."""
    by_rows: dict[int, float] = {}
    for cell in cells:
        by_rows[cell.rows] = by_rows.get(cell.rows, 0.0) + math.log(cell.fused / cell.dequantised)
    rows = sorted(by_rows)
    excess = [0.0, *itertools.accumulate(by_rows[m] for m in rows)]
    number = excess.index(min(excess))
    if number == 0:
        return LEAST
    if number == len(rows):
        return rows[-1]
    return _halfway(rows[number - 1], rows[number])


def wgmma_rows(cells: Iterable[Cell], fused: int) -> RowRange:
    """The rows for which to use wgmma, so that the GEMMs take the least time where others are fused up to
    `fused` rows. It ends at multiples of STEP halfway between numbers that were timed, and at none that was
    not reached."""
    by_rows: dict[int, float] = {}
    for cell in cells:
        if cell.wgmma is None:
            return NO_ROWS
        other = cell.fused if cell.rows <= fused else cell.dequantised
        by_rows[cell.rows] = by_rows.get(cell.rows, 0.0) + math.log(cell.wgmma / other)
    rows = sorted(by_rows)
    excess = [0.0, *itertools.accumulate(by_rows[m] for m in rows)]
    pairs = itertools.combinations(range(len(excess)), 2)
    first, end = min(pairs, key=lambda pair: excess[pair[1]] - excess[pair[0]], default=(0, 0))
    if excess[end] >= excess[first]:
        return NO_ROWS
    least = rows[first] if first == 0 else _halfway(rows[first - 1], rows[first]) + 1
    most = rows[-1] if end == len(rows) else _halfway(rows[end - 1], rows[end])
    return RowRange(least, most)


def _halfway(rows: int, more: int) -> int:
    return max(math.isqrt(rows * more) // STEP * STEP, rows)
