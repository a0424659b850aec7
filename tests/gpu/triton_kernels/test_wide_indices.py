"""Tensors of more than 2^31 elements, which nothing here has room for: in the compiled code a program's
number is widened to 64 bits before it is multiplied by a size, or used as an offset."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)

from bench.gpu import triton_calls, triton_code
from bench.gpu.triton_calls import BF16

TARGET = "sm80"
KERNELS = {
    "rms_norm_kernel",
    "rms_norm_backward_kernel",
    "rotary_kernel",
    "cross_entropy_kernel",
    "cross_entropy_backward_kernel",
    "groups_kernel",
}
DEFINED = re.compile(r"(%[\w#]+)(?::\d+)? = ([\w.]+) (.*)")


@lru_cache(maxsize=1)
def intermediate() -> dict[str, list[str]]:
    """Triton's intermediate code of each kernel's variants."""
    if reason := triton_code.unsupported(TARGET):
        pytest.skip(reason)
    found: dict[str, list[str]] = {}
    parts = triton_calls._blocks(BF16), triton_calls._losses(BF16, True), triton_calls._groups(BF16)
    given = [call for part in parts for call in part]
    for item in triton_code.launches(TARGET, given):
        if item.kernel.__name__ in KERNELS:
            with triton_code.compiling_for(TARGET):
                found.setdefault(item.kernel.__name__, []).append(triton_code.warm_up(item).asm["ttir"])
    return found


def faults(code: str) -> list[str]:
    """Lines that multiply 32 bits made of a program's number by anything but a constant, or add them to a
    pointer."""
    narrow: set[str] = set()
    wrong = []
    for line in code.splitlines():
        if (match := DEFINED.search(line)) is None:
            continue
        name, op, rest = match.groups()
        rest = rest.partition(" loc(")[0]
        operands = set(re.findall(r"%[\w#]+", rest))
        if op == "tt.get_program_id":
            narrow.add(name)
        elif operands & narrow and op != "arith.extsi":
            sized = {one for one in operands - narrow if not one.startswith(("%c", "%cst"))}
            if op == "tt.addptr" or (op == "arith.muli" and sized):
                wrong.append(line.strip())
            narrow.add(name)
    return wrong


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_numbers_of_programs_are_widened(kernel: str) -> None:
    for code in intermediate()[kernel]:
        assert "tt.get_program_id" in code and "arith.extsi" in code
        assert not faults(code)


def test_what_is_a_fault() -> None:
    code = """
    %row = tt.get_program_id x : i32 loc(#loc1)
    %part = arith.muli %row, %c32_i32 : i32 loc(#loc2)
    %wide = arith.extsi %part : i32 to i64 loc(#loc3)
    %at = arith.muli %wide, %features : i64 loc(#loc4)
    %short = arith.muli %part, %features : i32 loc(#loc5)
    %there = tt.addptr %x_ptr, %part : !tt.ptr<bf16>, i32 loc(#loc6)
    """
    assert [fault.split(" ")[0] for fault in faults(code)] == ["%short", "%there"]
