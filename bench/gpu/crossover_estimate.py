"""For how many rows of activations wgmma is fastest on an H100, estimated from the kernels' plans.

A kernel takes as long as the multiply-adds of its busiest block, or memory. The estimates that
`crossovers.json` has for LinearWgmma are from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft_kernels.core.backends.crossovers import NO_ROWS, Card, RowRange, Rows, estimate

from ..lib import report
from .crossover_timing import BLOCKSIZE, Cell, wgmma_rows
from .roofline import BY_ARCHITECTURE, NF4_BYTES, Gpu
from .step_estimate import reached
from .wave_quantization import planner

SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096))
"""Weights of an 8B model, from the smallest to the largest."""
ROWS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
MMA_SYNC_FLOPS = 0.65 * 645e12
"""Of our kernels for mma.sync: 65% of what an H100 has at most with it."""
WGMMA_REACHED = 0.9
"""Speed of LinearWgmma as a share of cuBLAS' when both are bound by the matrix units."""
PEAK_CLOCKS = 2048
"""Multiply-adds of a multiprocessor per clock, dense bf16 by wgmma."""
STAGE_CLOCKS = {64: 336, 128: 544, 256: 1024}
"""Of a stage of LinearWgmma by rows of its tile, as in WgmmaShape::stage_cost()."""
SHARED_STAGES = {"mma.sync": 4, "wgmma": 16}
"""What blocks that share a tile take to add their sums, in stages of 64 terms."""
WORTH = 1.05
"""How much faster wgmma must be by these estimates to be used: no card has measured it."""
LAUNCH = 2e-6
"""Seconds from the end of a kernel to the full speed of the next."""


def cells(
    plans: Any, gpu: Gpu, shapes: Sequence[tuple[int, int]] = SHAPES, rows: Sequence[int] = ROWS
) -> list[Cell]:
    return [
        Cell(
            n, k, m, is_dx,
            fused(plans, gpu, n, k, m, is_dx, "mma.sync"),
            dequantised(gpu, n, k, m),
            fused(plans, gpu, n, k, m, is_dx, "wgmma"),
        )
        for n, k in shapes for is_dx in (False, True) for m in rows
    ]  # fmt: skip


def fused(plans: Any, gpu: Gpu, n: int, k: int, m: int, is_dx: bool, kernels: str) -> float:
    """Seconds of a fused kernel on a card whose bandwidth is what copies reach."""
    card = gpu.architecture, gpu.sms, gpu.block_shared
    cut = plans.cuts_for(m, n, k, BLOCKSIZE, "bfloat16", *card, kernels=kernels)[is_dx]
    stages = cut["share"] + SHARED_STAGES[kernels] * (cut["workspace_bytes"] > 0)
    if kernels == "wgmma":
        speed = WGMMA_REACHED * gpu.flops / (2 * PEAK_CLOCKS * gpu.sms)  # clocks a second
        compute = stages * STAGE_CLOCKS[cut["tokens"]] / speed
    else:
        compute = 2 * stages * cut["features"] * cut["tokens"] * cut["depth"] / (MMA_SYNC_FLOPS / gpu.sms)
    memory = (n * k * NF4_BYTES + 2 * m * (n + k)) / gpu.bandwidth
    return LAUNCH + max(compute, memory)


def dense(gpu: Gpu, n: int, k: int, m: int) -> float:
    """Seconds of cuBLAS on weights in 16 bits."""
    return LAUNCH + max(2 * m * n * k / gpu.flops, 2 * (n * k + m * (n + k)) / gpu.bandwidth)


def dequantised(gpu: Gpu, n: int, k: int, m: int) -> float:
    return LAUNCH + gpu.dequantize(n, k) + dense(gpu, n, k, m)


def ranges(found: Sequence[Cell]) -> dict[int, tuple[RowRange, RowRange]]:
    """The rows for which to use wgmma, forward and backward, by size of the weight. With more or fewer, the
    other estimates of crossovers.json apply."""
    sizes = report.unique(cell.weights for cell in found)
    return {size: (_range(found, size, False), _range(found, size, True)) for size in sizes}


def _range(found: Sequence[Cell], size: int, is_dx: bool) -> RowRange:
    row = packaged(size)
    one = [
        cell._replace(wgmma=WORTH * (cell.wgmma or 0.0))
        for cell in found if (cell.weights, cell.is_backward) == (size, is_dx)
    ]  # fmt: skip
    return wgmma_rows(one, row.backward if is_dx else row.forward)


def shown(rows: RowRange) -> str:
    return "for no rows" if rows == NO_ROWS else f"for {rows.least} to {rows.most} rows"


def packaged(size: int) -> Rows:
    """The estimates of crossovers.json for a weight of this size on an H100."""
    return next(row for row in estimate(Card("", "9.0", 0)).limits.rows if size <= row.weights)


@dataclass(frozen=True)
class Case:
    gpu: Gpu
    seconds = 5.0

    @property
    def name(self) -> str:
        return f"crossovers-{self.gpu.slug}"

    def run(
        self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent
    ) -> Crossovers:
        plans = planner()
        if isinstance(plans, str):
            return Crossovers(self, absent={self.name: plans})
        return Crossovers(self, cells=cells(plans, reached(self.gpu)))


@dataclass
class Crossovers(report.Outcome):
    case: Case
    cells: Sequence[Cell] = ()

    def parts(self) -> Iterator[str]:
        for size, (forward, backward) in ranges(self.cells).items():
            yield f"{size:,} weights: wgmma {shown(forward)}, dx {shown(backward)}"

    def data(self) -> dict[str, Any]:
        return {"group": "crossovers", "cells": [cell._asdict() for cell in self.cells]}

    @classmethod
    def tables(cls, outcomes: Sequence[Crossovers], unit: str) -> Iterator[tuple[str, str]]:
        for found in outcomes:
            rows = []
            for cell in found.cells:
                n, k, m = cell[:3]
                alone = dense(reached(found.case.gpu), n, k, m)
                times = cell.fused, cell.wgmma or 0.0, cell.dequantised, alone
                name = f"{n}x{k}{' dx' if cell.is_backward else ''}"
                rows.append([name, str(m), *(f"{1e6 * time:.1f}" for time in times)])
            titles = "", "rows>", "mma.sync us>", "wgmma us>", "dequantise + cuBLAS us>", "dense us>"
            yield f"GEMMs with NF4 weights on {found.case.gpu.name}, estimated", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(BY_ARCHITECTURE[90])]
