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

from peft_kernels.core.backends.crossovers import ANY, NO_ROWS, Card, RowRange, Rows, forced
from peft_kernels.core.backends.self_test.gemms import BLOCKSIZE, MMA_SYNC, WGMMA

from . import events

Shape = tuple[int, int]
MANY_ROWS = (2048, 4096, 8192)
"""More of them of one weight, where a card has wgmma."""
DEQUANTISED = Rows(ANY, 0, 0)
LEAST = 32
"""Up to this many rows, reading the weight dominates, and a fused kernel reads a quarter of the bytes."""
STEP = 32
COPIES = 32
"""Of a weight, at most."""
SLEEP = 4_000_000
"""Clock cycles, about 2 ms."""


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


class Target(NamedTuple):
    """The device, the library and the clock of a timing."""

    library: Any
    """The compiled library, whose crossovers for the card are changed meanwhile and then removed."""
    ops: Any
    """Its namespace of torch.ops."""
    card: Card
    device: torch.device
    cache_bytes: int
    """The size of the device's L2 cache: copies of a weight that do not fit take turns."""
    clock: Callable[[Callable[[], object]], float]
    """Seconds that the device needs for the work that a function starts."""
    has_wgmma: bool = True
    """Whether wgmma may be timed, and MANY_ROWS too."""

    def plan(self, way: Rows, rows: int, shape: Shape, experts: int) -> str:
        problem = *shape, BLOCKSIZE, "bfloat16"
        with forced(self.library, self.card, way):
            if experts:
                return str(self.library.experts_plan(rows * experts, experts, *problem))
            return str(self.library.plan(rows, *problem))


def time_cells(on: Target, shapes: Sequence[Shape], rows: Sequence[int], experts: int = 0) -> list[Cell]:
    """Times all shapes with all numbers of rows, forward and backward: with one weight, or grouped GEMMs of
    so many experts with `rows` rows each, where torch's grouped GEMM has a kernel for the card."""
    cells = []
    random = torch.Generator(on.device).manual_seed(0)  # with constants cards draw less power and run faster
    with torch.no_grad():
        for shape in shapes:
            if experts and "grouped" not in on.plan(DEQUANTISED, 1, shape, experts):
                continue
            takes_wgmma = on.has_wgmma and "wgmma" in on.plan(WGMMA, rows[0], shape, experts)
            ways = (MMA_SYNC, DEQUANTISED, WGMMA)[: 2 + takes_wgmma]
            all_rows = (*rows, *MANY_ROWS) if takes_wgmma and not experts else rows
            weights = _weights(shape, random, on.cache_bytes, experts or 1)
            for m, is_backward in itertools.product(all_rows, (False, True)):
                size = m * (experts or 1), shape[not is_backward]
                given = [torch.randn(size, generator=random, dtype=torch.bfloat16, device=on.device)]
                if experts:
                    given.append(torch.arange(1, experts + 1, dtype=torch.int32, device=on.device) * m)
                turn = partial(_turn, on.ops, given, weights, shape, is_backward)
                seconds = []
                for way in ways:
                    with forced(on.library, on.card, way):
                        seconds.append(on.clock(turn) / len(weights))
                cells.append(Cell(*shape, m, is_backward, *seconds))
    return cells


def _weights(
    shape: Shape, random: torch.Generator, cache_bytes: int, experts: int
) -> list[tuple[Tensor, Tensor]]:
    """Copies of a weight, or of the weights of experts: codes and scales."""
    elements = experts * math.prod(shape)
    count = min(max(2 * cache_bytes // (elements // 2), 2), COPIES)
    size = count, elements // 2
    codes = torch.randint(256, size, generator=random, dtype=torch.uint8, device=random.device)
    scales = torch.ones(count, elements // BLOCKSIZE, dtype=torch.float32, device=random.device)
    return list(zip(codes, scales, strict=True))


def _turn(
    ops: Any,
    given: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor]],
    shape: Shape,
    is_backward: bool,
) -> None:
    """One GEMM with each copy of the weight, of x or of x and the ends of the experts' rows."""
    family = "nf4_linear" if len(given) == 1 else "experts_linear"
    op = getattr(ops, f"{family}_dx" if is_backward else family)
    rest = (shape[1],) if is_backward else (shape[0], None)
    for codes, scales in weights:
        op(*given, codes, scales, None, None, BLOCKSIZE, *rest)


def device_clock(run: Callable[[], object]) -> float:
    """The median of five times on the current CUDA stream, without Python's time."""

    def seconds() -> float:
        torch.cuda._sleep(SLEEP)  # work queues up after it
        return events.seconds(run)

    run()
    return statistics.median(seconds() for _ in range(5))


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
    rows, excess = _excess(cells, lambda cell: cell.fused / cell.dequantised)
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
    cells = [*cells]
    if any(cell.wgmma is None for cell in cells):
        return NO_ROWS
    rows, excess = _excess(
        cells, lambda cell: cell.wgmma / (cell.fused if cell.rows <= fused else cell.dequantised)
    )
    pairs = itertools.combinations(range(len(excess)), 2)
    first, end = min(pairs, key=lambda pair: excess[pair[1]] - excess[pair[0]], default=(0, 0))
    if excess[end] >= excess[first]:
        return NO_ROWS
    least = rows[first] if first == 0 else _halfway(rows[first - 1], rows[first]) + 1
    most = rows[-1] if end == len(rows) else _halfway(rows[end - 1], rows[end])
    return RowRange(least, most)


def _excess(cells: Iterable[Cell], ratio: Callable[[Any], float]) -> tuple[list[int], list[float]]:
    """The numbers of rows, and the sums of the logarithms of a ratio over none, one, two ... of them."""
    by_rows: dict[int, float] = {}
    for cell in cells:
        by_rows[cell.rows] = by_rows.get(cell.rows, 0.0) + math.log(ratio(cell))
    rows = sorted(by_rows)
    return rows, [0.0, *itertools.accumulate(by_rows[m] for m in rows)]


def _halfway(rows: int, more: int) -> int:
    return max(math.isqrt(rows * more) // STEP * STEP, rows)
