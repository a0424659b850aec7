"""How evenly GEMMs with NF4 weights fill a card, computed from the kernel plan: no GPU needed.

A cell is one GEMM of a layer, forward or to x, with a number of rows of activations, on one card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ptx_backend as ptx
from peft_kernels.core.backends import cuda

from ..lib import report
from ..lib.report import unique
from .roofline import BY_ARCHITECTURE, Gpu

Shape = tuple[int, int]
MODELS: dict[str, tuple[Shape, ...]] = {
    "Llama-3.2-1B": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "Llama-3.1-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama-3.1-70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "Qwen3-4B": ((4096, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (2560, 9728)),
    "Qwen3-8B": ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)),
    "Qwen3-32B": ((8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600)),
    "Mistral-7B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Gemma-2-9B": ((4096, 3584), (2048, 3584), (3584, 4096), (14336, 3584), (3584, 14336)),
    "squares": ((3072, 3072), (5120, 5120)),
}
"""out_features and in_features of all linear layers of a decoder block, from the models' config.json."""
SHAPES = unique(shape for shapes in MODELS.values() for shape in shapes)
ROWS = (1, 8, 16, 32, 64, 128, 512)
CARDS = [BY_ARCHITECTURE[architecture] for architecture in (80, 90, 100, 89, 120)]
LARGE = 9 * 2**20
"""Weights of a large matrix. Smaller ones have too few units of work to balance, and less of it than
launches."""
GOAL = 0.85
"""Utilisation that cells should reach."""


def planner() -> cuda.CudaLibrary | str:
    """A compiled library that plans, or why there is none. It needs no card."""
    reasons = []
    for backend in (ptx.BACKEND, cuda.BACKEND):
        backend.load()
        try:
            return backend.extension
        except RuntimeError as error:
            reasons.append(str(error))
    return "; ".join(reasons)


@dataclass(frozen=True)
class Cell:
    gpu: Gpu
    n: int
    k: int
    m: int
    is_dx: bool
    kernel: str
    cut: dict[str, int]
    """How the work is divided, as `cuts_for` of a compiled library reports it."""

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}{' dx' if self.is_dx else ''} M={self.m}"

    @property
    def is_large(self) -> bool:
        return self.n * self.k >= LARGE

    @cached_property
    def utilisation(self) -> float:
        """Work of the GEMM / work the card does in the time that its busiest worker takes.

        A kernel has equal units of work: tiles of the result by a part of the reduction. `share` is the
        number of units of the busiest worker, a warp or a block. It covers tiles that reach beyond the
        weight, idle warps, and multiprocessors with fewer units than others. A partly filled tile of tokens
        is no loss: there the time goes into weights.
        """
        cut = self.cut
        features, depth = (self.k, self.n) if self.is_dx else (self.n, self.k)
        units = features / cut["features"] * max(self.m / cut["tokens"], 1.0) * depth / cut["depth"]
        return units / (self.gpu.sms * cut["workers"] * cut["share"])


def cells(plans: Any, gpu: Gpu) -> list[Cell]:
    found = []
    for n, k in SHAPES:
        for is_dx in (False, True):
            for m in ROWS:
                problem = m, n, k, 64, "bfloat16", gpu.architecture, gpu.sms, gpu.block_shared
                kernels = plans.plan_for(*problem, kernels="mma.sync")
                cuts = plans.cuts_for(*problem)
                found.append(Cell(gpu, n, k, m, is_dx, kernels[is_dx], cuts[is_dx]))
    return found


@dataclass(frozen=True)
class Case:
    gpu: Gpu
    seconds = 5.0

    @property
    def name(self) -> str:
        return f"waves-{self.gpu.slug}"

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Waves:
        plans = planner()
        if isinstance(plans, str):
            return Waves(self, absent={self.name: plans})
        return Waves(self, cells=cells(plans, self.gpu))


@dataclass
class Waves(report.Outcome):
    case: Case
    cells: Sequence[Cell] = ()

    def parts(self) -> Iterator[str]:
        if self.cells:
            worst = min(self.cells, key=lambda cell: cell.utilisation)
            yield f"{len(self.cells)} cells, worst {worst.utilisation:.0%} at {worst.name}"

    def data(self) -> dict[str, Any]:
        names = ("name", "kernel", "cut", "utilisation")
        return {"group": "waves", "cells": [{name: getattr(c, name) for name in names} for c in self.cells]}

    @classmethod
    def tables(cls, outcomes: Sequence[Waves], unit: str) -> Iterator[tuple[str, str]]:
        rows = []
        for found in outcomes:
            for title, is_large in ((f"{LARGE:,} or more", True), ("fewer", False)):
                if group := [cell for cell in found.cells if cell.is_large == is_large]:
                    worst = min(group, key=lambda cell: cell.utilisation)
                    below = sum(cell.utilisation < GOAL for cell in group)
                    counts = str(len(group)), str(below), f"{worst.utilisation:.1%}"
                    rows.append([found.case.gpu.name, title, *counts, f"{worst.name}, {worst.kernel}"])
        if rows:
            titles = ("", "weights", "cells", f"below {GOAL:.0%}", "worst", "")
            yield "utilisation of cards by GEMMs with NF4 weights", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(gpu) for gpu in CARDS]
