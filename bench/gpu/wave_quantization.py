"""How products with NF4 weights fill a card, by arithmetic: from the plan, for cards that need not be here.

A cell is a product of a layer, forward or to x, with so many rows of activations on one card. Nothing of it
is timed. What is left out: launches, the filling of a block's tables and the first loads (2 to 3 us in all,
which are more than many small cells), and sums that blocks share, but for their bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..lib import report
from ..lib.report import three_digits, unique
from . import limits, sass
from .roofline import BY_ARCHITECTURE, KIB, NF4_BYTES, Gpu

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
ROWS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)


class Card(NamedTuple):
    gpu: Gpu
    shared: int
    """Bytes of a block at most: the CUDA programming guide's table of compute capabilities."""
    mma: float
    """The part of gpu.flops that mma.sync reaches, which is all that these kernels use: 0.63 of a Hopper's
    (Luo et al. 2024, arXiv:2402.13499); the same is taken of B200, for which no figure is known."""

    @property
    def args(self) -> tuple[int, int, int]:
        """As the plan wants it."""
        return self.gpu.architecture, self.gpu.sms, self.shared

    @property
    def slug(self) -> str:
        return self.gpu.name.lower().replace(" sxm", "").replace(" ", "-")


CARDS = (
    Card(BY_ARCHITECTURE[80], 163 * KIB, 1.0),
    Card(BY_ARCHITECTURE[90], 227 * KIB, 0.63),
    Card(BY_ARCHITECTURE[100], 227 * KIB, 0.63),
    Card(BY_ARCHITECTURE[89], 99 * KIB, 1.0),
    Card(BY_ARCHITECTURE[120], 99 * KIB, 1.0),
)

KERNELS = {
    "small8": ("LinearSmall", "1, 1"),
    "small16": ("LinearSmall", "2, 2"),
    "small32": ("LinearSmall", "4, 2"),
    "tiles256": ("LinearTiles", "8"),
    "tiles128": ("LinearTiles", "4"),
    "dx8": ("LinearDx", "1"),
    "dx16": ("LinearDx", "2"),
    "dx32": ("LinearDx", "4"),
    "dx64": ("LinearDx", "8"),
}
"""The ways of a plan, by their names without `_narrow`: a kernel and the instance's last parameters."""
PIECES = "pieces"
TILE = (128, 256)
"""Of torch's product of a piece: features by tokens."""


def planner() -> ModuleType | str:
    """A compiled library that plans, or why there is none."""
    reasons = []
    for name in ("_C_ptx", "_C_cuda"):
        try:
            return importlib.import_module(f"peft_kernels.{name}")
        except ImportError as error:
            reasons.append(f"peft_kernels.{name}: {error}")
    return "; ".join(reasons)


def instructions(way: str, architecture: int) -> float:
    """Of a lane, for a weight of a tile: the most that tests/gpu/test_sass.py lets the way's kernel have."""
    name, parameters = KERNELS[way.removesuffix("_narrow")]
    table = "NarrowTable" if way.endswith("_narrow") or way == "dx64" else "WideTable"
    kernel = sass.Kernel(f"{name}<bf16, {table}, {parameters}>", Path(), architecture)
    rule = limits.rule_for(kernel)
    if rule is None or rule.limit is None:
        raise ValueError(f"{way}: no limit for {kernel.name} on sm_{architecture}")
    return rule.limit


@dataclass(frozen=True)
class Cell:
    card: Card
    n: int
    k: int
    m: int
    is_dx: bool
    way: str
    cut: dict[str, int]
    """As plan_for() and cuts_for() of a compiled library tell; without a kernel the columns of a piece."""

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}{' dx' if self.is_dx else ''} M={self.m}"

    @property
    def features(self) -> int:
        """Of the result; the sums are as long as the weight's other side."""
        return self.k if self.is_dx else self.n

    @property
    def depth(self) -> int:
        return self.n if self.is_dx else self.k

    @cached_property
    def utilisation(self) -> float:
        """The work there is / what the card does in the time that its busiest worker takes.

        A kernel has equal units of work: tiles of the result by a part of their sums. The plan tells how many
        of them the busiest worker gets, which may be a warp or a block. That one figure has everything in it:
        units beyond the edge of the weight (rounding of tiles), warps that get none, multiprocessors that
        get fewer than others (waves). Tokens that fill less than one tile are no loss: with few of them,
        weights are what takes the time.

        A product by pieces is torch's: tiles of 128 x 256, one for each multiprocessor in a wave.
        """
        cut, sms = self.cut, self.card.gpu.sms
        if self.way == PIECES:
            tiles = self.m / TILE[1] * self.features / TILE[0]
            return min(1.0, max(tiles, self.features / TILE[0]) / (self._waves * sms))
        rows = max(self.m / cut["tokens"], 1.0)
        units = self.features / cut["features"] * rows * self.depth / cut["depth"]
        return units / (sms * cut["workers"] * cut["share"])

    @property
    def _waves(self) -> int:
        """Of all pieces."""
        piece, down = self.cut["piece"], ceil(self.m / TILE[1])
        widths = [min(piece, self.features - begin) for begin in range(0, self.features, piece)]
        return sum(ceil(down * ceil(width / TILE[0]) / self.card.gpu.sms) for width in widths)

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds that each resource of the card would take if it were busy all the time.

        m(emory): the weight's bytes once, activations and results once, and parts of sums that blocks share
        twice; of a product by pieces, the dequantised weight as well, which is written and read.
        i(ssue slots): the kernel's instructions for each weight, once for each tile of tokens.
        c(ompute): the matrix instructions, of tokens up to a whole tile or 8.
        """
        gpu, weights = self.card.gpu, self.n * self.k
        moved = weights * NF4_BYTES + 2 * self.m * (self.n + self.k)
        if self.way == PIECES:
            product = 2 * weights * self.m / gpu.flops / self.utilisation
            return {"m": (moved + 2 * 2 * weights) / gpu.bandwidth, "c": product}
        passes = ceil(self.m / self.cut["tokens"])
        issued = weights * passes * instructions(self.way, gpu.architecture)
        tokens = ceil(self.m / 8) * 8
        return {
            "m": (moved + 2 * self._shared_bytes) / gpu.bandwidth,
            "i": issued / gpu.lanes,
            "c": 2 * weights * tokens / (gpu.flops * self.card.mma),
        }

    @property
    def _shared_bytes(self) -> int:
        """Parts of sums: from one to the next, either the tile or the block is another one."""
        cut = self.cut
        parts = cut["splits"] * cut["tiles"] + cut["blocks"]
        return min(cut["workspace_bytes"], 4 * parts * cut["features"] * cut["tokens"])

    @property
    def bound(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def seconds(self) -> float:
        """As long as the scarcest resource takes, stretched by what of the card is idle. By pieces, weights
        are dequantised first, and the product's idle parts are in its time."""
        if self.way == PIECES:
            return self.card.gpu.dequantize(self.n, self.k) + max(self.parts.values())
        return max(self.parts.values()) / min(self.utilisation, 1.0)

    @property
    def floor(self) -> float:
        return self.card.gpu.linear(self.n, self.k, self.m)[0]


def shapes() -> list[Shape]:
    return unique(shape for found in MODELS.values() for shape in found)


def cells(plans: ModuleType, card: Card, rows: Iterable[int] = ROWS) -> list[Cell]:
    return [cell(plans, card, n, k, m, is_dx) for n, k in shapes() for is_dx in (False, True) for m in rows]


def cell(plans: Any, card: Card, n: int, k: int, m: int, is_dx: bool) -> Cell:
    way = plans.plan_for(m, n, k, 64, "bfloat16", *card.args)[is_dx]
    cut = plans.cuts_for(m, n, k, 64, "bfloat16", *card.args)[is_dx]
    if way == PIECES:
        count, length = (k, n) if is_dx else (n, k)
        cut = {"piece": plans.piece_of(count, length, 2)}
    return Cell(card, n, k, m, is_dx, way, cut)


# As cases of bench/run.py.


@dataclass(frozen=True)
class Case:
    card: Card
    all_cells: bool = False
    seconds = 1.0

    @property
    def name(self) -> str:
        return f"{'every-cell' if self.all_cells else 'waves'}-{self.card.slug}"

    def run(
        self, timing: report.Timing | None = None, progress: report.Progress = lambda phase: None
    ) -> Waves:
        plans = planner()
        if isinstance(plans, str):
            return Waves(self, absent={self.name: plans})
        return Waves(self, cells=cells(plans, self.card))


@dataclass
class Waves(report.Outcome):
    """What came of a case: cells, or in `absent` why there are none."""

    case: Case
    cells: Sequence[Cell] = ()

    def line(self) -> str:
        if not self.cells:
            return "; ".join(self.absent.values())
        worst = min(self.cells, key=lambda cell: cell.utilisation)
        return f"{len(self.cells)} cells, worst {worst.utilisation:.0%} at {worst.name}"

    def data(self) -> dict[str, Any]:
        told = ("name", "way", "cut", "utilisation", "parts", "bound", "seconds", "floor")
        return {"group": "waves", "cells": [{name: getattr(c, name) for name in told} for c in self.cells]}

    @classmethod
    def tables(cls, outcomes: Sequence[Waves], unit: str) -> Iterator[tuple[str, str]]:
        """A kernel in a row: its worst cell, and how many come to less than 85%. Predicted times are in us,
        by m(emory), i(ssue slots) or c(ompute), as is the shortest that the card allows."""
        titles = ("", "cells", "below 85%", "worst", "", "predicted", "", "floor")
        for found in outcomes:
            if not found.cells:
                continue
            by_way: dict[str, list[Cell]] = {}
            for one in found.cells:
                by_way.setdefault(one.way, []).append(one)
            rows = [
                _row(way, f"{len(group)}", f"{sum(c.utilisation < GOAL for c in group)}", _worst(group))
                for way, group in sorted(by_way.items())
            ]
            yield f"waves: how kernels fill {found.case.card.gpu.name}", report.table(titles, rows)
            if found.case.all_cells:
                yield "all cells", report.table(titles, (_row(c.way, "", "", c) for c in found.cells))


GOAL = 0.85
"""Utilisation that every cell of up to 512 rows is to come to."""


def _worst(found: Sequence[Cell]) -> Cell:
    return min(found, key=lambda one: one.utilisation)


def _row(way: str, count: str, below: str, one: Cell) -> list[str]:
    times = [three_digits(seconds * 1e6) for seconds in (one.seconds, one.floor)]
    return [way, count, below, f"{one.utilisation:.0%}", one.name, times[0], one.bound, times[1]]


def standard() -> list[Case]:
    return [Case(card, every) for every in (False, True) for card in CARDS]
