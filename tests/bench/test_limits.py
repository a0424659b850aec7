"""Counting of instructions per weight; test_sass.py has tests on compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu import limits
from bench.gpu.limits import Rule
from bench.gpu.sass import Instruction, Kernel


def test_products_of_fp32_are_several_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve matrix instructions of two tiles of ranks and three products: twice four weights."""
    monkeypatch.setattr(limits, "RULES", [Rule("k", 2.0, tokens=16, tf32_products=3)])

    def check(matrix: str, others: int) -> limits.Finding:
        work, other = Instruction(matrix, False, ()), Instruction("NOP", False, ())
        leave = Instruction("BRA", True, (".loop",)), Instruction("EXIT", False, ())
        code, labels = [*[work] * 12, *[other] * others, *leave], {".loop": 0}
        return limits.check(
            Kernel("k", Path(), 90, threads=32, registers=32, instructions=code, labels=labels)
        )

    assert check("HMMA.1688.F32.TF32", 3).per_weight == 16 / 8
    assert check("HMMA.1688.F32.TF32", 3).faults == ()
    (fault,) = check("HMMA.1688.F32.TF32", 4).faults
    assert fault == "2.12 instructions per weight, at most 2 allowed"
    (fault,) = check("HMMA.16816.F32", 3).faults
    assert fault == f"has no {limits.MATRIX_TF32}"
