"""What the compiled CUDA kernels are held to, and what was found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .roofline import NF4_BYTES
from .sass import ARCHITECTURES, Instruction, Kernel, count

MATRIX, MATRIX_16, MATRIX_TF32 = r"HMMA", r"HMMA\.16816", r"HMMA\.1688\.F32\.TF32"
WIDE_STORE = r"STG?\.E\.(EF\.|NA\.)*128"
LOCAL = r"(LDL|STL)\b"
MATRIX_WEIGHTS, TF32_WEIGHTS, STORE_BYTES = 8, 4, 16
"""Of a lane in one such instruction: a matrix instruction multiplies 16 x 16 weights by 8 tokens, or of tf32,
16 x 8 of them, for which it takes as long."""


@dataclass(frozen=True)
class Rule:
    """The kernels whose names match do their work in matrix instructions, or write weights out.

    Where elements of activations are what a kernel handles, they stand for weights.
    """

    pattern: str
    limit: float | None = None
    """The most instructions of a lane for a weight, on the longest way that does as much as any."""
    tokens: int = 0
    """That a warp multiplies each of its weights by, or ranks of an adapter; 0: no product with weights."""
    tf32_products: int = 0
    """That one of numbers in fp32 is made of; 0: it is of 16 bits."""
    written: int = 0
    """Bytes that each weight is written out in; 0: none is."""
    read: float = NF4_BYTES
    """Bytes that are read for each weight."""
    architectures: Sequence[int] = ARCHITECTURES
    """Where the kernel is used."""

    @property
    def does(self) -> str:
        if self.written:
            return WIDE_STORE
        return MATRIX_TF32 if self.tf32_products else MATRIX_16 if self.tokens else MATRIX

    def per_weight(self, path: Sequence[Instruction]) -> float | None:
        """Instructions of a lane for one of the weights that it handles on the path."""
        done = count(path, self.does)
        weights = done * STORE_BYTES / self.written if self.written else 0
        if self.tokens:
            one = TF32_WEIGHTS / self.tf32_products if self.tf32_products else MATRIX_WEIGHTS
            weights = done * one / (self.tokens / 8)
        return len(path) / weights if weights else None


# The wide table costs no arithmetic, and 64 KB. Cards without room for it have issue slots to spare.
WIDE, NARROW = (80, 90, 100), (86, 89, 120)
RULES: Sequence[Rule] = (
    Rule(r"DequantizeNf4<float>", 8.0, written=4),
    Rule(r"DequantizeNf4<(bf16|fp16)>", 8.0, written=2),
    Rule(r"LinearSmall<\w+, WideTable, 1, \d>", 1.8, tokens=8, architectures=WIDE),
    Rule(r"LinearSmall<\w+, WideTable, 2, \d>", 2.2, tokens=16, architectures=WIDE),
    Rule(r"LinearSmall<\w+, WideTable, 4, \d>", 2.8, tokens=32, architectures=WIDE),
    Rule(r"LinearSmall<\w+, NarrowTable, 1, \d>", 2.4, tokens=8, architectures=NARROW),
    Rule(r"LinearSmall<\w+, NarrowTable, 2, \d>", 2.8, tokens=16, architectures=NARROW),
    Rule(r"LinearSmall<\w+, NarrowTable, 4, \d>", 3.5, tokens=32, architectures=NARROW),
    Rule(r"LinearTiles<\w+, WideTable, \d>", 4.8, tokens=64, architectures=WIDE),
    Rule(r"LinearTiles<\w+, NarrowTable, \d>", 5.7, tokens=64, architectures=NARROW),
    Rule(r"LinearDx<bf16, WideTable, 1>", 2.5, tokens=8, architectures=WIDE),
    Rule(r"LinearDx<fp16, WideTable, 1>", 2.9, tokens=8, architectures=WIDE),
    Rule(r"LinearDx<bf16, WideTable, 2>", 2.7, tokens=16, architectures=WIDE),
    Rule(r"LinearDx<fp16, WideTable, 2>", 3.1, tokens=16, architectures=WIDE),
    Rule(r"LinearDx<bf16, WideTable, 4>", 3.1, tokens=32, architectures=WIDE),
    Rule(r"LinearDx<fp16, WideTable, 4>", 3.4, tokens=32, architectures=WIDE),
    Rule(r"LinearDx<bf16, NarrowTable, 1>", 2.9, tokens=8, architectures=NARROW),
    Rule(r"LinearDx<fp16, NarrowTable, 1>", 3.4, tokens=8, architectures=NARROW),
    Rule(r"LinearDx<bf16, NarrowTable, 2>", 3.1, tokens=16, architectures=NARROW),
    Rule(r"LinearDx<fp16, NarrowTable, 2>", 3.5, tokens=16, architectures=NARROW),
    Rule(r"LinearDx<bf16, NarrowTable, 4>", 3.7, tokens=32),
    Rule(r"LinearDx<fp16, NarrowTable, 4>", 3.9, tokens=32),
    Rule(r"LinearDx<\w+, NarrowTable, 8>", 4.5, tokens=64, architectures=WIDE),
    Rule(r"ExpertsTiles<\w+, WideTable>", 4.8, tokens=64, architectures=WIDE),
    Rule(r"ExpertsTiles<\w+, NarrowTable>", 5.8, tokens=64, architectures=NARROW),
    Rule(r"ExpertsDx<bf16, 4>", 3.7, tokens=32),
    Rule(r"ExpertsDx<fp16, 4>", 3.9, tokens=32),
    Rule(r"ExpertsDx<\w+, 6>", 4.3, tokens=48, architectures=WIDE),
    Rule(r"SumRows<1>", 11.0, tokens=8, tf32_products=3),
    Rule(r"SumRows<2>", 15.5, tokens=16, tf32_products=3),
    Rule(r"(Lora(Shrink|Expand|OverRows)|Experts(Shrink|OverRows)|Bottleneck(Rows|Expand))<.*>"),
    Rule(r"Gated<float, .*, false>", 36.0, written=4, read=8),
    Rule(r"Gated<(bf16|fp16), .*, false>", 36.0, written=2, read=4),
    Rule(r"Gated<float, .*, true>", 54.0, written=8, read=12),
    Rule(r"Gated<(bf16|fp16), .*, true>", 54.0, written=4, read=6),
    Rule(r"ScaleColumns<float, true>", 15.0, written=4, read=4),
    Rule(r"ScaleColumns<(bf16|fp16), true>", 15.0, written=2, read=2),
    Rule(r"ScaleColumnsBackward<float, true>", 15.0, written=4, read=8),
    Rule(r"ScaleColumnsBackward<(bf16|fp16), true>", 15.0, written=2, read=4),
    # Of fp32 parameters with moments in 32 bits; optimizer_waves.py has all.
    Rule(r"AdamWStep<false>", 41.0, written=12, read=16),
    Rule(r"AdamWStep<true>", 36.0, written=8, read=12),
)


class Card(NamedTuple):
    """What a streaming multiprocessor of an architecture has for the blocks that run on it at once."""

    registers: int
    shared: int
    warps: int
    blocks: int


KIB = 2**10
CARDS = {
    80: Card(65536, 164 * KIB, 64, 32),
    86: Card(65536, 100 * KIB, 48, 16),
    89: Card(65536, 100 * KIB, 48, 24),
    90: Card(65536, 228 * KIB, 64, 32),
    100: Card(65536, 228 * KIB, 64, 32),
    120: Card(65536, 100 * KIB, 48, 24),
}
REGISTER_UNIT, SCHEDULERS = 256, 4  # per warp; each with its share of the registers
SHARED_RESERVED, SHARED_UNIT = KIB, 128  # per block


@dataclass(frozen=True)
class Finding:
    """What a kernel came to on one architecture."""

    kernel: Kernel
    warps: int
    """That can be resident on a multiprocessor."""
    per_weight: float | None = None
    """Instructions of a lane."""
    least: float | None = None
    """The same on the shortest way, without dropout and the like."""
    rule: Rule | None = None
    per_matrix: float | None = None
    """Instructions for one of the tensor cores, on the shortest way."""
    around: int = 0
    """Further instructions in a round of the loop around the main loop, on the shortest way."""
    faults: tuple[str, ...] = ()


def rule_for(kernel: Kernel) -> Rule | None:
    used = (rule for rule in RULES if kernel.architecture in rule.architectures)
    return next((rule for rule in used if re.fullmatch(rule.pattern, kernel.name)), None)


def judge(kernel: Kernel) -> Finding:
    """Hold a kernel to its limits: none may spill, and each does its work in the instructions meant."""
    faults = []
    if kernel.spill_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes")
    if local := count(kernel.instructions, LOCAL):
        faults.append(f"{local} accesses to local memory")
    if not (warps := resident_warps(kernel)):
        faults.append(f"does not fit: {kernel.registers} registers, {kernel.shared} bytes shared")
    rule = rule_for(kernel)
    if rule is None:
        return Finding(kernel, warps, faults=tuple(faults))
    shortest, longest = (kernel.main_path(rule.does, longest) for longest in (False, True))
    if not count(longest, rule.does):
        faults.append(f"has no {rule.does}")
    least, most = rule.per_weight(shortest), rule.per_weight(longest)
    if rule.limit is not None and most is not None and most > rule.limit:
        faults.append(f"{most:.2f} instructions per weight, at most {rule.limit:g} allowed")
    matrix = count(shortest, MATRIX)
    per_matrix = len(shortest) / matrix if matrix else None
    around = len(kernel.main_path(rule.does, longest=False, around=True)) - len(shortest)
    return Finding(kernel, warps, most, least, rule, per_matrix, around, tuple(faults))


def resident_warps(kernel: Kernel) -> int:
    """By registers and shared memory, as far as that is known before a launch."""
    card, schedulers = CARDS[kernel.architecture], SCHEDULERS
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-kernel.shared // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    by_registers = card.registers // schedulers // registers * schedulers // warps
    return warps * min(card.blocks, card.warps // warps, by_registers, card.shared // shared)
