"""Limits on the compiled CUDA kernels: spills, tensor cores, instructions per weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .roofline import BY_ARCHITECTURE, REGISTERS, RESERVED_SHARED
from .sass import ARCHITECTURES, Instruction, Kernel, count

MATRIX, MATRIX_16, MATRIX_TF32 = r"HMMA", r"HMMA\.16816", r"HMMA\.1688\.F32\.TF32"
WARPGROUP = r"HGMMA"
WIDE_STORE = r"STG?\.E\.(EF\.|NA\.)*128"
LOCAL = r"(LDL|STL)\b"
MATRIX_WEIGHTS, TF32_WEIGHTS, STORE_BYTES = 8, 4, 16
"""Per lane of one instruction: a matrix instruction multiplies 16 x 16 weights by 8 tokens, or 16 x 8 of tf32
in the same time; one of a warpgroup 64 x 16 weights by all tokens."""


@dataclass(frozen=True)
class Rule:
    """A limit for the kernels whose names match, which use matrix instructions or write weights out.

    For kernels on activations, "weight" means an element of them.
    """

    pattern: str
    limit: float | None = None
    """Instructions of a lane per weight at most, along the longest path with the most work."""
    tokens: int = 0
    """Tokens (or ranks of an adapter) that a warp multiplies each weight by; 0: no GEMM with weights."""
    tf32_products: int = 0
    """tf32 products that make up one fp32 product; 0: operands are 16-bit."""
    warpgroup: bool = False
    """Whether the matrix instructions are those of a warpgroup."""
    written: int = 0
    """Bytes written per weight; 0: weights are not written out."""
    architectures: Sequence[int] = ARCHITECTURES
    """On which the kernel is used."""

    @property
    def work(self) -> str:
        """Pattern of the instructions that do the kernel's work."""
        if self.written:
            return WIDE_STORE
        if self.warpgroup:
            return WARPGROUP
        return MATRIX_TF32 if self.tf32_products else MATRIX_16 if self.tokens else MATRIX

    def per_weight(self, path: Sequence[Instruction]) -> float | None:
        """Instructions of a lane per weight handled on the path."""
        done = count(path, self.work)
        weights = done * STORE_BYTES / self.written if self.written else 0
        if self.tokens:
            one = TF32_WEIGHTS / self.tf32_products if self.tf32_products else MATRIX_WEIGHTS
            weights = done * one / (1 if self.warpgroup else self.tokens / 8)
        return len(path) / weights if weights else None


def by_groups(pattern: str, limits: Sequence[float], architectures: Sequence[int]) -> list[Rule]:
    """Rules of kernels that multiply by 1, 2 and 4 groups of eight tokens."""
    return [
        Rule(pattern.format(1 << i), limit, tokens=8 << i, architectures=architectures)
        for i, limit in enumerate(limits)
    ]


# The wide table takes 64 KB and no arithmetic. Cards with less shared memory have issue slots to spare.
WIDE, NARROW = (80, 90, 100), (86, 89, 120)
RULES: Sequence[Rule] = (
    Rule(r"DequantizeNf4<float>", 8.0, written=4),
    Rule(r"DequantizeNf4<(bf16|fp16)>", 8.0, written=2),
    Rule(r"DequantizeExperts", 9.8, written=2),
    Rule(r"DequantizeAny<float>", 8.8, written=4),
    Rule(r"DequantizeAny<(bf16|fp16)>", 9.0, written=2),
    Rule(r"DequantizeAnyExperts", 10.8, written=2),
    Rule(r"DequantizeGroups<float, (E4M3|Int8), 8>", 13.7, written=4),
    Rule(r"DequantizeGroups<float, Int4, 8>", 11.8, written=4),
    Rule(r"DequantizeGroups<(bf16|fp16), (E4M3|Int8), 8>", 14.1, written=2),
    Rule(r"DequantizeGroups<(bf16|fp16), Int4, 8>", 12.2, written=2),
    *by_groups(r"LinearSmall<\w+, WideTable, GroupScales, {}, \d>", (1.8, 2.2, 2.8), WIDE),
    *by_groups(r"LinearSmall<\w+, NarrowTable, GroupScales, {}, \d>", (2.4, 2.8, 3.5), NARROW),
    *by_groups(r"LinearSmall<\w+, WideTable, ScaleCodes, {}, \d>", (2.5, 2.8, 3.2), WIDE),
    *by_groups(r"LinearSmall<\w+, NarrowTable, ScaleCodes, {}, \d>", (3.0, 3.4, 3.8), NARROW),
    Rule(r"LinearTiles<\w+, WideTable, \d>", 4.8, tokens=64, architectures=WIDE),
    Rule(r"LinearTiles<\w+, NarrowTable, \d>", 5.7, tokens=64, architectures=NARROW),
    *by_groups(r"LinearDx<bf16, WideTable, {}>", (2.5, 2.7, 3.1), WIDE),
    *by_groups(r"LinearDx<fp16, WideTable, {}>", (2.9, 3.1, 3.4), WIDE),
    *by_groups(r"LinearDx<bf16, NarrowTable, {}>", (2.9, 3.1), NARROW),
    *by_groups(r"LinearDx<fp16, NarrowTable, {}>", (3.4, 3.5), NARROW),
    Rule(r"LinearDx<bf16, NarrowTable, 4>", 3.7, tokens=32),
    Rule(r"LinearDx<fp16, NarrowTable, 4>", 3.9, tokens=32),
    Rule(r"LinearDx<\w+, NarrowTable, 8>", 4.5, tokens=64, architectures=WIDE),
    *(
        Rule(rf"LinearWgmma{dx}<\w+, {tokens}>", limit, tokens, warpgroup=True, architectures=(90,))
        for dx, limit in (("", 3.3), ("Dx", 3.7))
        for tokens in (64, 128, 256)
    ),
    *(
        Rule(rf"ExpertsWgmma{dx}<\w+, {tokens}>", limit, tokens, warpgroup=True, architectures=(90,))
        for dx, limit in (("", 3.3), ("Dx", 3.7))
        for tokens in (64, 128)
    ),
    Rule(r"ExpertsTiles<\w+, WideTable>", 4.8, tokens=64, architectures=WIDE),
    Rule(r"ExpertsTiles<\w+, NarrowTable>", 5.8, tokens=64, architectures=NARROW),
    Rule(r"ExpertsDx<bf16, 4>", 3.7, tokens=32),
    Rule(r"ExpertsDx<fp16, 4>", 3.9, tokens=32),
    Rule(r"ExpertsDx<\w+, 6>", 4.3, tokens=48, architectures=WIDE),
    Rule(r"SumRows<1>", 11.0, tokens=8, tf32_products=3),
    Rule(r"SumRows<2>", 15.5, tokens=16, tf32_products=3),
    Rule(
        r"(Lora(Shrink|Expand|OverRows)|Experts(Shrink|OverRows)|Bottleneck(Rows|Groups|Expand))<.*>|ExpertsExpand"
    ),
    Rule(r"Gated<float, .*, false>", 36.0, written=4),
    Rule(r"Gated<(bf16|fp16), .*, false>", 36.0, written=2),
    Rule(r"Gated<float, .*, true>", 54.0, written=8),
    Rule(r"Gated<(bf16|fp16), .*, true>", 54.0, written=4),
    Rule(r"ScaleColumns<float, true>", 15.0, written=4),
    Rule(r"ScaleColumns<(bf16|fp16), true>", 15.0, written=2),
    Rule(r"ScaleColumnsBackward<float, true>", 15.0, written=4),
    Rule(r"ScaleColumnsBackward<(bf16|fp16), true>", 15.0, written=2),
    # With fp32 results, or gradients of them; the last argument: elements of a thread.
    Rule(r"RmsNorm<float, false, \d+, 8>", 13.8, written=4),
    Rule(r"RmsNorm<float, false, \d+, 16>", 10.4, written=4),
    Rule(r"RmsNorm<(bf16|fp16), false, \d+, 8>", 19.2, written=4),
    Rule(r"RmsNorm<(bf16|fp16), false, \d+, 16>", 15.0, written=4),
    Rule(r"RmsNorm<float, true, .*>", 18.6, written=8),
    Rule(r"RmsNorm<(bf16|fp16), true, .*>", 25.5, written=6),
    Rule(r"RmsNormBackward<float, false, .*>", 24.0, written=4),
    Rule(r"RmsNormBackward<float, true, .*>", 27.0, written=4),
    Rule(r"RmsNormBackward<(bf16|fp16), false, .*>", 27.5, written=2),
    Rule(r"RmsNormBackward<(bf16|fp16), true, .*>", 34.5, written=2),
    Rule(r"RotaryHalves<float, float, 4>", 8.7, written=4),
    Rule(r"RotaryHalves<(bf16|fp16), float, 8>", 8.2, written=4),
    Rule(r"RotaryHalves<(bf16, bf16|fp16, fp16), 8>", 5.5, written=4),
    # fp32 parameters with 32-bit moments. The limits of the other dtypes are in adamw_loops.py.
    Rule(r"AdamWStep<false>", 41.0, written=12),
    Rule(r"AdamWStep<true>", 36.0, written=8),
)


WARPGROUP_THREADS = 128
REGISTER_UNIT, SCHEDULERS = 256, 4  # per warp; each has its share of the registers
SHARED_UNIT = 128


@dataclass(frozen=True)
class Finding:
    kernel: Kernel
    warps: int
    """Resident on a multiprocessor."""
    per_weight: float | None = None
    """Instructions of a lane."""
    least: float | None = None
    """The same along the shortest path, without dropout and the like."""
    rule: Rule | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Role:
    """What warps do after setmaxnreg."""

    registers: int
    """Of a thread from then on."""
    is_producer: bool
    """Whether they gave registers away."""
    used: int
    """Registers up to the highest that an instruction names."""


def roles(kernel: Kernel) -> list[Role]:
    found = []
    for i, instruction in enumerate(kernel.instructions):
        if instruction.name == "USETMAXREG":
            registers = int(instruction.operands.split()[-2], 16)
            used = max(map(_used, kernel.reachable(i)), default=0)
            found.append(Role(registers, "DEALLOC" in instruction.opcode, used))
    return found


def _used(instruction: Instruction) -> int:
    """Registers up to the highest that is named. A vector of up to four, named by its first, ends before the
    next multiple of four, as limits do; the sums of a warpgroup are longer."""
    used = 1 + max((int(n) for n in re.findall(r"\bR(\d+)", instruction.operands)), default=-1)
    if found := re.match(r"HGMMA\.64x(\d+)x16\.F32", instruction.opcode):
        used = max(used, int(instruction.operands.split(",")[0].strip(" R")) + int(found[1]) // 2)
    return used


def pool_faults(kernel: Kernel) -> list[str]:
    """Roles that take more registers than their block has, which never ends, or use more than they have."""
    found = roles(kernel)
    if not found:
        return []
    faults = [f"uses R{r.used - 1} of {r.registers} registers" for r in found if r.used > r.registers]
    producers = [role.registers for role in found if role.is_producer]
    consumers = [role.registers for role in found if not role.is_producer]
    if len(producers) != 1 or len(consumers) != 1:
        return [*faults, f"has roles of {producers} and {consumers} registers"]
    # One warpgroup produces, the others multiply.
    wanted = WARPGROUP_THREADS * producers[0] + (kernel.threads - WARPGROUP_THREADS) * consumers[0]
    if wanted > kernel.registers * kernel.threads:
        faults.append(f"takes {wanted} registers of {kernel.registers} x {kernel.threads}")
    return faults


def rule_for(kernel: Kernel) -> Rule | None:
    used = (rule for rule in RULES if kernel.architecture in rule.architectures)
    return next((rule for rule in used if re.fullmatch(rule.pattern, kernel.name)), None)


def check(kernel: Kernel) -> Finding:
    """Checks a kernel against its limits: no spills, its work in the intended instructions, and few of
    them."""
    faults = []
    if kernel.spill_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes")
    if local := count(kernel.instructions, LOCAL):
        faults.append(f"{local} accesses to local memory")
    faults += [f"ptxas: {warning}" for warning in kernel.warnings]
    faults += pool_faults(kernel)
    if not (warps := resident_warps(kernel)):
        faults.append(f"does not fit: {kernel.registers} registers, {kernel.shared} bytes shared")
    rule = rule_for(kernel)
    if rule is None:
        return Finding(kernel, warps, faults=tuple(faults))
    shortest, longest = (kernel.main_path(rule.work, longest) for longest in (False, True))
    if not count(longest, rule.work):
        faults.append(f"has no {rule.work}")
    if rule.warpgroup and count(kernel.main_loop(rule.work), MATRIX):
        faults.append("has matrix instructions of single warps in the main loop")
    least, most = rule.per_weight(shortest), rule.per_weight(longest)
    if rule.limit is not None and most is not None and most > rule.limit:
        faults.append(f"{most:.2f} instructions per weight, at most {rule.limit:g} allowed")
    return Finding(kernel, warps, most, least, rule, tuple(faults))


def resident_warps(kernel: Kernel) -> int:
    """On one multiprocessor, by registers and by the shared memory that is known before a launch."""
    gpu = BY_ARCHITECTURE[kernel.architecture]
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-kernel.shared // SHARED_UNIT) * SHARED_UNIT + RESERVED_SHARED
    by_registers = REGISTERS // SCHEDULERS // registers * SCHEDULERS // warps
    return warps * min(gpu.blocks, gpu.warps // warps, by_registers, gpu.shared // shared)
