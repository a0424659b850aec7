"""A step of AdamW or Lion on a card, by arithmetic: what its kernel takes for an element, as compiled.

`loops` finds the loops of AdamWStep in what nvcc made of it, one for each type of parameter and of moments,
and `faults` holds them to `LIMITS`. The cases put those limits beside what cards allow; nothing of it is
timed. What is left out: the launch, the filling of a block's tables and the first loads (3 to 5 us in all).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core.code_tables import dynamic_map
from peft_kernels.ops.optim import STATE_BLOCK

from ..lib import report
from ..lib.report import three_digits
from .sass import Instruction, Kernel, count
from .wave_quantization import CARDS, Card

# As compiled.

MINE = 8
"""Elements of a lane in a round of a loop."""
VECTORS = r"(LDG|STG)\.E\.(EF\.|NA\.)*(64|128)$"
NARROW = r"(LDG|STG)\.E\.(EF\.|NA\.)*[US](8|16)\b"
FP64 = r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F\.F64|F2F\.F32\.F64|I2F\.F64"


class Kind(NamedTuple):
    """What a loop is for."""

    lion: bool
    dtype: str
    bits: int
    care: bool = False
    """Rounding is stochastic or compensated for."""

    @property
    def size(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def moments(self) -> int:
        return 1 if self.lion else 2

    @property
    def bytes(self) -> float:
        """Of an element, read and written."""
        moment = 1 + 4 / STATE_BLOCK if self.bits == 8 else 4
        return 3 * self.size + 2 * self.moments * moment

    @property
    def name(self) -> str:
        name = f"{'Lion' if self.lion else 'AdamW'}, {self.dtype}, moments in {self.bits} bits"
        return f"{name}, rounded with care" if self.care else name


LIMITS = {
    Kind(False, "fp32", 8): (60.0, 55.5),
    Kind(False, "bf16", 8): (61.0, 58.0),
    Kind(False, "fp16", 8): (63.0, 57.0),
    Kind(False, "fp32", 32): (26.0, 25.0),
    Kind(False, "bf16", 32): (29.0, 28.0),
    Kind(False, "fp16", 32): (29.0, 28.0),
    Kind(True, "fp32", 8): (40.0, 37.0),
    Kind(True, "bf16", 8): (42.5, 39.5),
    Kind(True, "fp16", 8): (42.5, 39.5),
    Kind(True, "fp32", 32): (20.0, 19.0),
    Kind(True, "bf16", 32): (23.0, 22.0),
    Kind(True, "fp16", 32): (23.0, 22.0),
    # By compensation and stochastic rounding at once.
    Kind(False, "bf16", 8, True): (95.0, 84.0),
    Kind(False, "bf16", 32, True): (61.0, 55.0),
    Kind(True, "bf16", 8, True): (72.0, 62.0),
    Kind(True, "bf16", 32, True): (51.5, 45.0),
}
"""The most instructions of a lane for an element, up to Hopper and from Blackwell on, on the shortest way: no
weight decay into the gradient, and all numbers finite."""


def limit(kind: Kind, architecture: int) -> float:
    return LIMITS[kind][architecture >= 100]


def loops(kernel: Kernel) -> dict[Kind, list[Instruction]]:
    """Of AdamWStep, one round of each of its loops by vectors, on the shortest way."""
    graph = kernel._graph
    found: dict[Kind, list[Instruction]] = {}
    stores = [block for block in kernel.successors if count(kernel._block(block), r"STG") > 0]
    for loop in graph.innermost(stores):
        path = graph.best_path(loop, lambda b: (count(kernel._block(b), VECTORS), -len(kernel._block(b))))
        code = [instruction for block in path for instruction in kernel._block(block)]
        if not count(code, VECTORS):
            continue
        halves = count(code, r"STG\.E\.(EF\.|NA\.)*64$")
        dtype = "bf16" if count(code, r"F2FP\.BF16") else "fp16" if count(code, r"F2FP") else "fp32"
        bits = 8 if count(code, r"LDS") else 32
        kind = Kind("<true>" in kernel.name, dtype, bits, halves == 4)
        if kind in found:
            raise ValueError(f"{kernel.name}: two loops for {kind.name}")
        found[kind] = code
    return found


def faults(kernel: Kernel) -> list[str]:
    """Where the loops of AdamWStep are not what they are meant to be."""
    found = loops(kernel)
    wanted = {kind for kind in LIMITS if kind.lion == ("<true>" in kernel.name)}
    said = [f"no loop for {kind.name}" for kind in sorted(wanted - found.keys())]
    for kind, code in found.items():
        each = len(code) / MINE
        most = limit(kind, kernel.architecture)
        if each > most:
            said.append(f"{kind.name}: {each:.2f} instructions an element, at most {most:g} allowed")
        # Two of each for parameter and gradient, and as many of a moment: of 16, 8 or 4 bytes.
        by_size = dict.fromkeys((32, 64, 128), 0)
        by_size[8 * 4 * kind.size] += 4 + 2 * kind.care
        by_size[32 if kind.bits == 8 else 128] += 2 * kind.moments
        for size, least in by_size.items():
            pattern = r"LDG\.E$" if size == 32 else rf"LDG\.E\.{size}$"
            if count(code, pattern) < least:
                said.append(f"{kind.name}: {count(code, pattern)} loads of {size} bits, expected {least}")
        for what, pattern in (("of single elements", NARROW), ("of fp64", FP64)):
            if number := count(code, pattern):
                said.append(f"{kind.name}: {number} instructions {what}")
    return said


# Lookups in shared memory, from banks that lanes share.


@lru_cache
def wavefronts() -> dict[str, float]:
    """Of a lookup by 32 lanes, on average over maps (by codes) and bins (by numbers), for either moment after
    100 steps of normal gradients whose size differs from element to element."""
    generator = torch.Generator().manual_seed(0)
    m = torch.zeros(256, STATE_BLOCK)
    v = torch.zeros(256, STATE_BLOCK)
    spread = torch.rand(v.shape, generator=generator).mul(4).exp()
    for _ in range(100):
        grad = torch.randn(v.shape, generator=generator) * spread
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
    found = {}
    for name, x, signed in (("m", m, True), ("v", v, False)):
        scaled = x / x.abs().amax(1, keepdim=True)
        codes = torch.bucketize(scaled, _midpoints(signed))
        bits, shift, lowest = scaled.abs().float(), 17 if signed else 16, -22 if signed else -23
        bins = bits.clamp(min=2.0**lowest).view(torch.int32) >> shift
        bins += (scaled < 0) * ((-lowest << (23 - shift)) + 1)
        found[name] = (_repeats(codes) + _repeats(bins)) / 2
    return found


def _midpoints(signed: bool) -> Tensor:
    values = dynamic_map(torch.device("cpu"), signed)
    return (values[1:] + values[:-1]) / 2


def _repeats(words: Tensor) -> float:
    """How many different words of one bank lanes want at most; a lane has every fourth element."""
    lanes = words.view(-1, 2, 32, 4).transpose(2, 3).reshape(-1, 32).tolist()
    most = []
    for lane in lanes:
        banks = [word % 32 for word in set(lane)]
        most.append(max(map(banks.count, set(banks))))
    return sum(most) / len(most)


# By arithmetic.

SPECIAL = 16
"""Square roots and reciprocals of a lane that a multiprocessor starts in a cycle."""
WARPS, BLOCKS_PER_SM = 10, 2
GOAL = 0.8
"""The part of the memory's bandwidth that 100 million parameters are to come to."""
LORA = (16 * 700,) * 448
SIZES: dict[str, Sequence[int]] = {
    "5M in one tensor": (sum(LORA),),
    "5M in 448 tensors": LORA,
    "100M in one tensor": (100_000_000,),
}
SHOWN = [
    kind for kind in LIMITS if kind.dtype != "fp16" and not kind.care and not (kind.lion and kind.bits == 32)
]


@dataclass(frozen=True)
class Step:
    """Of so many parameters, each with so many elements."""

    card: Card
    kind: Kind
    size: str

    @property
    def numels(self) -> Sequence[int]:
        return SIZES[self.size]

    @property
    def instructions(self) -> float:
        return limit(self.kind, self.card.gpu.architecture)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that each resource would take if it were busy all the time: m(emory), i(ssue slots),
        s(hared memory's banks), u(nits for roots and reciprocals)."""
        gpu, elements = self.card.gpu, sum(self.numels)
        cycles = gpu.sms * gpu.clock
        parts = {
            "m": elements * self.kind.bytes / gpu.bandwidth,
            "i": elements * self.instructions / gpu.lanes,
        }
        if self.kind.bits == 8:
            each = sum(list(wavefronts().values())[: self.kind.moments])
            parts["s"] = elements * 2 * each / 32 / cycles
        if not self.kind.lion:
            parts["u"] = elements * 2 / SPECIAL / cycles
        return parts

    @property
    def bound(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def utilisation(self) -> float:
        """The blocks of moments that there are / those that the card does while its busiest warps are at
        work. Each block of threads has a run of them, of which its warps take one of a tensor at a time."""
        counts = [ceil(numel / STATE_BLOCK) for numel in self.numels]
        blocks, resident = sum(counts), BLOCKS_PER_SM * self.card.gpu.sms
        grid = min(ceil(blocks / WARPS), resident)
        busiest, tensor, at = 0, 0, 0
        for i in range(grid):
            left, rounds = blocks // grid + (i < blocks % grid), 0
            while left:
                here = min(left, counts[tensor] - at)
                rounds += ceil(here / WARPS)
                left, at = left - here, at + here
                if at == counts[tensor]:
                    tensor, at = tensor + 1, 0
            busiest = max(busiest, rounds)
        return blocks / (WARPS * resident * busiest)

    @property
    def seconds(self) -> float:
        return max(self.parts.values()) / self.utilisation

    @property
    def reached(self) -> float:
        """Of the bandwidth."""
        return self.parts["m"] / self.seconds


# As cases of bench/run.py.


@dataclass(frozen=True)
class Case:
    card: Card
    seconds = 1.0

    @property
    def name(self) -> str:
        return f"waves-adamw-{self.card.slug}"

    def run(
        self, timing: report.Timing | None = None, progress: report.Progress = lambda phase: None
    ) -> Steps:
        return Steps(self, steps=[Step(self.card, kind, size) for kind in SHOWN for size in SIZES])


@dataclass
class Steps(report.Outcome):
    """What came of a case."""

    case: Case
    steps: Sequence[Step] = ()

    def line(self) -> str:
        worst = min(self.steps, key=lambda step: step.reached)
        return f"{len(self.steps)} steps, at worst {worst.reached:.0%} of the bandwidth: {worst.kind.name}"

    def goals(self) -> Iterator[tuple[str, bool]]:
        for step in self.steps:
            if step.size.startswith("100M"):
                text = f"{step.kind.name}, {step.size}: at least {GOAL:.0%} of the bandwidth"
                yield f"{text}, by arithmetic {step.reached:.0%}", step.reached >= GOAL

    def data(self) -> dict[str, Any]:
        steps = [
            {"kind": step.kind.name, "size": step.size, "parts": step.parts, "seconds": step.seconds}
            for step in self.steps
        ]
        return {"group": "waves-adamw", "steps": steps, "wavefronts": wavefronts()}

    @classmethod
    def tables(cls, outcomes: Sequence[Steps], unit: str) -> Iterator[tuple[str, str]]:
        """Times are in us, by m(emory), i(ssue slots), s(hared memory) or u(nits for roots)."""
        titles = ("", "", "bytes", "instr", "busy", "predicted", "", "of bandwidth")
        for found in outcomes:
            rows = [
                [
                    step.kind.name,
                    step.size,
                    f"{step.kind.bytes:.1f}",
                    f"{step.instructions:g}",
                    f"{step.utilisation:.0%}",
                    three_digits(step.seconds * 1e6),
                    step.bound,
                    f"{step.reached:.0%}",
                ]
                for step in found.steps
            ]
            yield f"a step of the optimizer on {found.case.card.gpu.name}", report.table(titles, rows)


def standard() -> list[Case]:
    return [Case(card) for card in CARDS]
