"""Runs the inline assembly that decodes packed weights in Triton kernels for every byte, on a model of its
instructions.

The model of `prmt` follows the PTX ISA, that of `v_perm_b32` AMD's ISA documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from peft_kernels.core.formats import CODE_VALUES, FORMATS
from peft_kernels.triton_kernels.core import launch
from peft_kernels.triton_kernels.nf4 import nf4_decode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLIT_SCALE = "split_f16"
"""The kind with two float16 tables."""
each_kind = pytest.mark.parametrize(
    "kind", (*DTYPES, SPLIT_SCALE), ids=lambda kind: str(kind).removeprefix("torch.")
)
each_codes = pytest.mark.parametrize("codes", nf4_decode.KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def prmt(low: int, high: int, selector: int) -> int:
    """PTX prmt: four bytes of eight, selected by four nibbles; their high bits replicate the sign."""
    entries, result = (high << 32 | low).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = entries[nibble & 7]
        result |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


def v_perm(high: int, low: int, selector: int) -> int:
    """v_perm_b32: four bytes of eight, selected by four bytes; values from 8 give signs and constants."""
    entries, result = (high << 32 | low).to_bytes(8, "little"), 0
    for i, by in enumerate(selector.to_bytes(4, "little")):
        if by >= 12:
            byte = 0 if by == 12 else 0xFF
        elif by >= 8:
            byte = 0xFF * (entries[2 * (by - 8) + 1] >> 7)
        else:
            byte = entries[by]
        result |= byte << 8 * i
    return result


LANES_BEFORE_THE_LAST = (1 << 31) - 1
INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, n: a >> n,
    "mov.u32": lambda a: a,
    "prmt.b32": prmt,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_lshrrev_b32": lambda n, a: a >> n,
    "v_mov_b32": lambda a: a,
    "s_mov_b32": lambda a: a,
    "v_perm_b32": v_perm,
}


def run(assembly: str, given: dict[str, int]) -> dict[str, int]:
    """The registers after the instructions."""
    registers = {"%lanemask_lt": LANES_BEFORE_THE_LAST, **given}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.split(r"[;\n]", assembly.strip("{} ")):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        registers[target] = INSTRUCTIONS[name](*map(value, operands)) & 0xFFFFFFFF
    return registers


def tables_of(kind: Any, codes: int) -> tuple[torch.Tensor, ...]:
    return nf4_decode.split_f16(codes) if kind == SPLIT_SCALE else (nf4_decode.table(codes, kind),)


def expected(byte: int, numbers: torch.Tensor) -> tuple[int, int]:
    """The bits of a byte's values: of the high code, then of the low code."""
    bits = numbers.view(torch.int32 if numbers.itemsize == 4 else torch.int16).tolist()
    mask = (1 << 8 * numbers.itemsize) - 1
    return bits[byte >> 4] & mask, bits[byte & 15] & mask


def words() -> list[list[int]]:
    """Words of four bytes that include every value at every position."""
    values = torch.arange(256)
    columns = [values, (values * 37 + 11) % 256, (values * 91 + 5) % 256, 255 - values]
    return torch.stack(columns, 1).tolist()


@each_codes
@each_dtype
def test_tables_hold_the_codes(dtype: torch.dtype, codes: int) -> None:
    """Those of FP4 and E2M1 exactly, down to the sign of a zero."""
    factor, truth = nf4_decode.DECODE_SCALE[codes][dtype], torch.tensor(CODE_VALUES[codes])
    numbers = nf4_decode.table(codes, dtype)
    assert torch.equal(numbers, (truth * factor).to(dtype))
    assert torch.equal(numbers.signbit(), truth.signbit())
    if codes != FORMATS["nf4"].codes:
        assert torch.equal(numbers.float(), truth * factor)


@each_codes
def test_two_float16_values_hold_a_code(codes: int) -> None:
    """To one ulp of fp32, without subnormals, which some cards flush to 0."""
    high, low = (numbers.double() for numbers in nf4_decode.split_f16(codes))
    truth = torch.tensor(CODE_VALUES[codes]).double() * nf4_decode.SPLIT_SCALE
    assert ((high + low - truth).abs() <= truth.abs() * 2**-23).all()
    least = torch.finfo(torch.float16).smallest_normal
    assert all(number == 0 or abs(number) >= least for number in (*high.tolist(), *low.tolist()))


@each_codes
@each_kind
def test_ptx(kind: Any, codes: int) -> None:
    tables = tables_of(kind, codes)
    assembly, count = nf4_decode.ptx(*tables), sum(2 * numbers.itemsize for numbers in tables)
    for word in words():
        got = run(assembly, {f"${count}": int.from_bytes(bytes(word), "little")})
        first = 0
        for numbers in tables:
            for i, byte in enumerate(word):
                high, low = expected(byte, numbers)
                if numbers.itemsize == 4:
                    assert (got[f"${i}"], got[f"${4 + i}"]) == (high, low)
                else:
                    assert got[f"${first + i}"] == low << 16 | high
            first += 2 * numbers.itemsize


@each_codes
@each_kind
def test_amdgcn(kind: Any, codes: int) -> None:
    tables = tables_of(kind, codes)
    assembly, results = nf4_decode.amdgcn(*tables), sum(2 * numbers.itemsize for numbers in tables)
    for word in words():
        pairs = [word[0] | word[1] << 16, word[2] | word[3] << 16]
        got = run(assembly, {f"${results + 8 + i}": pair for i, pair in enumerate(pairs)})
        begin = 0
        for table in tables:
            count = table.itemsize
            numbers = [
                int.from_bytes(
                    b"".join(got[f"${first + i}"].to_bytes(4, "little") for i in range(count)), "little"
                )
                for first in (begin, begin + count)
            ]
            begin += 2 * count
            for i, byte in enumerate(word):
                mask, shift = (1 << 8 * count) - 1, 8 * count * i
                assert tuple(number >> shift & mask for number in numbers) == expected(byte, table)


@each_codes
@each_kind
def test_amdgcn_runs_on_gfx9(kind: Any, codes: int) -> None:
    """GFX9 allows at most one scalar register and no constant in an instruction with three operands. Only
    results and declared clobbers are written, and these before they are read."""
    tables, written = tables_of(kind, codes), set()
    count = sum(2 * numbers.itemsize for numbers in tables)
    spare = {f"${count + i}" for i in range(8)} | {"s70", "s71"}
    for line in nf4_decode.amdgcn(*tables).splitlines():
        name, _, rest = line.partition(" ")
        target, *operands = rest.split(", ")
        assert target in spare | {f"${i}" for i in range(count)}
        if name == "v_perm_b32":
            assert sum(operand[0] == "s" for operand in operands) <= 1 and all(o[0] in "$s" for o in operands)
        given = {f"${count + 8}", f"${count + 9}"}
        assert all(operand[0] not in "$s" or operand in written | given for operand in operands)
        written.add(target)


@triton.jit
def decode_kernel(packed, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    numbers = nf4_decode.decode(tl.load(packed + at), out.dtype.element_ty, 64)
    tl.store(out + tl.arange(0, 2 * BLOCK), numbers)


@each_dtype
@pytest.mark.parametrize("target", ("gfx942", "gfx950", "gfx1100", "gfx1200"))
@pytest.mark.skipif(launch.INTERPRETED, reason="Triton interprets its kernels in this process")
def test_vector_instructions_for_a_weight(target: str, dtype: torch.dtype) -> None:
    """On AMD cards, with load and store. Four levels of selection took 24 to 28."""
    from bench.gpu import triton_code

    if reason := triton_code.unsupported(target):
        pytest.skip(reason)
    lanes, block = 64 if target.startswith("gfx9") else 32, 4096
    args: Any = torch.empty(1, dtype=torch.uint8, device="meta"), torch.empty(1, dtype=dtype, device="meta")
    with triton_code.compiling_for(target):
        made = decode_kernel.warmup(*args, BLOCK=block, grid=(1,), num_warps=4)
    count = len(re.findall(r"^\s*v_", made.asm["amdgcn"], re.MULTILINE))
    assert count / (2 * block / (4 * lanes)) <= (11.5 if dtype == torch.float32 else 6.6)
