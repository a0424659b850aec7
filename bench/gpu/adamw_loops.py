"""Limits on the loops of the optimizer kernel AdamWStep, one loop per dtype of parameters and of moments.

`loops` finds them in the compiled kernel, `faults` compares them with `LIMITS`
(tests/gpu/test_adamw_cuda.py).
"""

from __future__ import annotations

from typing import NamedTuple

from .sass import Instruction, Kernel, count

WARPS, BLOCKS_PER_SM = 10, 2
PER_LANE = 8
"""Elements of a lane in one iteration of a loop."""
VECTORS = r"(LDG|STG)\.E\.(EF\.|NA\.)*(64|128)$"
NARROW = r"(LDG|STG)\.E\.(EF\.|NA\.)*[US](8|16)\b"
FP64 = r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F\.F64|F2F\.F32\.F64|I2F\.F64"


class Kind(NamedTuple):
    """Optimizer, dtype of the parameters and bits of the moments that a loop handles."""

    lion: bool
    dtype: str
    bits: int
    is_compensated: bool = False
    """With stochastic rounding and Kahan compensation."""

    @property
    def size(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def moments(self) -> int:
        return 1 if self.lion else 2

    @property
    def name(self) -> str:
        name = f"{'Lion' if self.lion else 'AdamW'}, {self.dtype}, moments in {self.bits} bits"
        return f"{name}, compensated" if self.is_compensated else name


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
    Kind(False, "bf16", 8, True): (95.0, 84.0),
    Kind(False, "bf16", 32, True): (61.0, 55.0),
    Kind(True, "bf16", 8, True): (72.0, 62.0),
    Kind(True, "bf16", 32, True): (51.5, 45.0),
}
"""Instructions of a lane per element at most, up to Hopper and from Blackwell on, along the shortest path: no
weight decay into the gradient, all values finite."""


def loops(kernel: Kernel) -> dict[Kind, list[Instruction]]:
    """One iteration of each vectorised loop of AdamWStep, along the shortest path."""
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
    """How the loops of AdamWStep differ from what they should be."""
    found = loops(kernel)
    wanted = {kind for kind in LIMITS if kind.lion == ("<true>" in kernel.name)}
    found_faults = [f"no loop for {kind.name}" for kind in sorted(wanted - found.keys())]
    for kind, code in found.items():
        each = len(code) / PER_LANE
        most = LIMITS[kind][kernel.architecture >= 100]
        if each > most:
            found_faults.append(f"{kind.name}: {each:.2f} instructions an element, at most {most:g} allowed")
        # Two of each for parameter and gradient, and as many of a moment: of 16, 8 or 4 bytes.
        by_size = dict.fromkeys((32, 64, 128), 0)
        by_size[8 * 4 * kind.size] += 4 + 2 * kind.is_compensated
        by_size[32 if kind.bits == 8 else 128] += 2 * kind.moments
        for size, least in by_size.items():
            pattern = r"LDG\.E$" if size == 32 else rf"LDG\.E\.{size}$"
            if count(code, pattern) < least:
                found_faults.append(
                    f"{kind.name}: {count(code, pattern)} loads of {size} bits, expected {least}"
                )
        for what, pattern in (("of single elements", NARROW), ("of fp64", FP64)):
            if number := count(code, pattern):
                found_faults.append(f"{kind.name}: {number} instructions {what}")
    return found_faults
