"""Decodes the codes of packed weights and of their scales inside kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.formats import CODE_VALUES, FORMATS, LAYOUT_SHIFT
from ..core.launch import targets_amd, targets_ptx
from ..core.layouts import FUSED_CODES

KINDS = FUSED_CODES

DECODE_SCALE = {
    FORMATS["nf4"].codes: {torch.float32: 1.0, torch.bfloat16: 1.436715, torch.float16: 1.36619},
    FORMATS["fp4"].codes: {torch.float32: 1.0, torch.bfloat16: 12.0, torch.float16: 12.0},
    FORMATS["mxfp4"].codes: {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0},
}
"""Decoded values are multiplied by this, so that all 16 are close to values of the dtype. NF4's RMS rounding
error in bfloat16 is 7e-4 with it, 1.1e-3 without; the others' values are exact."""

SPLIT_SCALE = 256.0
"""Scale of codes that are decoded as sums of two float16 values: both are normal then."""

Table = Tensor  # the values of the 16 codes


def table(codes: int, dtype: torch.dtype) -> Table:
    return (torch.tensor(CODE_VALUES[codes]) * DECODE_SCALE[codes][dtype]).to(dtype)


def split_f16(codes: int) -> tuple[Table, Table]:
    """float16 tables of the codes times `SPLIT_SCALE` and of the remainder: their sum is fp32 to one ulp."""
    numbers = torch.tensor(CODE_VALUES[codes]) * SPLIT_SCALE
    high = numbers.half()
    return high, (numbers - high.float()).half()


def _planes(numbers: Table) -> list[list[int]]:
    """A table as byte planes: for each byte of the entries four words of four entries."""
    entries = numbers.view(torch.uint8).view(16, -1).tolist()
    return [
        [int.from_bytes(bytes(e[plane] for e in entries[i : i + 4]), "little") for i in range(0, 16, 4)]
        for plane in range(len(entries[0]))
    ]


def ptx(*tables: Table) -> str:
    """PTX that decodes the eight codes of four packed bytes, the last operand, to $0, $1, ...

    `prmt` picks four entries of half a plane by the low three bits of four codes; a second one picks between
    the halves by the codes' high bits. 16-bit results are pairs, one per byte; 32-bit results are those of
    the high codes, then of the low codes. The results of each table follow those of the one before.

    `prmt` needs one of its two words in a register. `zero` is 0, but unknown to the compiler, which would
    otherwise load the constant again for each use.
    """
    results = sum(2 * numbers.itemsize for numbers in tables)
    packed = f"${results}"
    lines = [
        ".reg .b32 low<2>, high<2>, first, second, plane<4>, part<4>, left<4>, right<4>, zero;",
        "mov.u32 zero, %lanemask_lt;",
        "shr.u32 zero, zero, 31;",
        f"and.b32 low0, {packed}, 0x77777777;",
        f"shr.u32 high0, {packed}, 1;",
        "and.b32 high0, high0, 0x44444444;",
        "or.b32 high0, high0, 0x32103210;",
        "shr.u32 low1, low0, 16;",
        "shr.u32 high1, high0, 16;",
    ]
    out = 0
    for numbers in tables:
        planes = _planes(numbers)
        for plane, words in enumerate(planes):
            lines += [
                f"xor.b32 left{plane}, zero, {words[0]:#x};",
                f"xor.b32 right{plane}, zero, {words[2]:#x};",
            ]
        for half in range(2):  # two bytes, whose codes are, in order: low, high, low, high
            for plane, words in enumerate(planes):
                lines += [
                    f"prmt.b32 first, left{plane}, {words[1]:#x}, low{half};",
                    f"prmt.b32 second, right{plane}, {words[3]:#x}, low{half};",
                    f"prmt.b32 plane{plane}, first, second, high{half};",
                ]
            at = out + 2 * half
            if len(planes) == 2:
                lines += [
                    f"prmt.b32 ${at}, plane0, plane1, 0x4051;",
                    f"prmt.b32 ${at + 1}, plane0, plane1, 0x6273;",
                ]
            else:
                lines += [
                    "prmt.b32 part0, plane0, plane1, 0x5140;",
                    "prmt.b32 part1, plane0, plane1, 0x7362;",
                    "prmt.b32 part2, plane2, plane3, 0x5140;",
                    "prmt.b32 part3, plane2, plane3, 0x7362;",
                    f"prmt.b32 ${4 + at}, part0, part2, 0x5410;",
                    f"prmt.b32 ${at}, part0, part2, 0x7632;",
                    f"prmt.b32 ${4 + at + 1}, part1, part3, 0x5410;",
                    f"prmt.b32 ${at + 1}, part1, part3, 0x7632;",
                ]
        out += 2 * len(planes)
    return "{ " + " ".join(lines) + " }"


def amdgcn(*tables: Table) -> str:
    """The same in AMD's instructions, where `v_perm_b32` selects bytes.

    Operands: per table the values of the high codes ($0, ...), then of the low codes; eight scratch
    registers; the packed bytes, two per register. On GFX9 an instruction with three operands reads at most
    one scalar register and no constant.
    """
    results = sum(2 * numbers.itemsize for numbers in tables)
    spare = [f"${results + i}" for i in range(8)]
    index, half, other, packed, *parts = spare
    first, second = (f"${results + 8 + i}" for i in range(2))
    lines = ["s_mov_b32 s70, 0x6040200", f"v_perm_b32 {packed}, {second}, {first}, s70"]
    for high in (True, False):
        shift = 4 if high else 0
        lines += [
            f"v_lshrrev_b32 {index}, {shift}, {packed}",
            f"v_lshrrev_b32 {half}, {shift + 1}, {packed}",
            f"v_and_b32 {index}, 0x7070707, {index}",
            f"v_and_b32 {half}, 0x4040404, {half}",
            f"v_or_b32 {half}, 0x3020100, {half}",
        ]
        first_result = 0
        for numbers in tables:
            count = numbers.itemsize  # registers of four values
            out = first_result + (0 if high else count)
            first_result += 2 * count
            for part, words in zip(parts, _planes(numbers), strict=False):
                lines += [
                    f"s_mov_b32 s70, {words[0]:#x}",
                    f"s_mov_b32 s71, {words[2]:#x}",
                    f"v_mov_b32 {part}, {words[1]:#x}",
                    f"v_mov_b32 {other}, {words[3]:#x}",
                    f"v_perm_b32 {part}, {part}, s70, {index}",
                    f"v_perm_b32 {other}, {other}, s71, {index}",
                    f"v_perm_b32 {part}, {other}, {part}, {half}",
                ]
            lines += ["s_mov_b32 s70, 0x5010400", "s_mov_b32 s71, 0x7030602"]
            if count == 2:
                lines += [f"v_perm_b32 ${out + i}, {parts[1]}, {parts[0]}, s7{i}" for i in range(2)]
            else:
                lines += [
                    f"v_perm_b32 {other}, {parts[1]}, {parts[0]}, s71",
                    f"v_perm_b32 {parts[0]}, {parts[1]}, {parts[0]}, s70",
                    f"v_perm_b32 {parts[1]}, {parts[3]}, {parts[2]}, s71",
                    f"v_perm_b32 {parts[2]}, {parts[3]}, {parts[2]}, s70",
                    "s_mov_b32 s70, 0x5040100",
                    "s_mov_b32 s71, 0x7060302",
                    f"v_perm_b32 ${out}, {parts[2]}, {parts[0]}, s70",
                    f"v_perm_b32 ${out + 1}, {parts[2]}, {parts[0]}, s71",
                    f"v_perm_b32 ${out + 2}, {parts[1]}, {other}, s70",
                    f"v_perm_b32 ${out + 3}, {parts[1]}, {other}, s71",
                ]
    return "\n".join(lines)


def _constraints(registers: int) -> str:
    """Constraints of `amdgcn`. Results are early-clobber: they are written before the last read of the
    bytes."""
    return ",".join(["=&v"] * (registers + 8) + ["v", "v", "~{s70}", "~{s71}"])


# By the codes.
CODE = tl.constexpr({codes: CODE_VALUES[codes] for codes in KINDS})
NEGATIVE_ZERO = tl.constexpr(
    {codes: next((i for i, x in enumerate(CODE_VALUES[codes]) if str(x) == "-0.0"), None) for codes in KINDS}
)
"""The code of -0.0: Triton makes a constant of it that is 0.0."""
DECODE_F32 = tl.constexpr({codes: ptx(table(codes, torch.float32)) for codes in KINDS})
DECODE_BF16 = tl.constexpr({codes: ptx(table(codes, torch.bfloat16)) for codes in KINDS})
DECODE_F16 = tl.constexpr({codes: ptx(table(codes, torch.float16)) for codes in KINDS})
DECODE_SPLIT = tl.constexpr({codes: ptx(*split_f16(codes)) for codes in KINDS})
PERM_F32 = tl.constexpr({codes: amdgcn(table(codes, torch.float32)) for codes in KINDS})
PERM_BF16 = tl.constexpr({codes: amdgcn(table(codes, torch.bfloat16)) for codes in KINDS})
PERM_F16 = tl.constexpr({codes: amdgcn(table(codes, torch.float16)) for codes in KINDS})
PERM_SPLIT = tl.constexpr({codes: amdgcn(*split_f16(codes)) for codes in KINDS})
DECODE_SCALE_BF16 = tl.constexpr({codes: DECODE_SCALE[codes][torch.bfloat16] for codes in KINDS})
DECODE_SCALE_F16 = tl.constexpr({codes: DECODE_SCALE[codes][torch.float16] for codes in KINDS})
PTX_OF_8 = tl.constexpr(",".join(["=r"] * 8 + ["r"]))
PTX_OF_4 = tl.constexpr(",".join(["=r"] * 4 + ["r"]))
PERM_OF_4 = tl.constexpr(_constraints(8))
PERM_OF_2 = tl.constexpr(_constraints(4))
SPLIT_SCALE_F32 = tl.constexpr(SPLIT_SCALE)


@triton.constexpr_function
def codes_of(layout):
    """`formats.codes_of`, inside kernels."""
    return layout >> LAYOUT_SHIFT


@triton.constexpr_function
def block_shift(layout):
    """Inside kernels: the blocksize is 2^block_shift."""
    return (layout & (1 << LAYOUT_SHIFT) - 1).bit_length() - 1


@triton.jit
def value_of(code, LAYOUT: tl.constexpr):
    """The fp32 values of 4-bit codes (int32), by four levels of selection; for any target."""
    VALUE: tl.constexpr = CODE[codes_of(LAYOUT)]
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    q0 = tl.where(b1, tl.where(b0, VALUE[3], VALUE[2]), tl.where(b0, VALUE[1], VALUE[0]))
    q1 = tl.where(b1, tl.where(b0, VALUE[7], VALUE[6]), tl.where(b0, VALUE[5], VALUE[4]))
    q2 = tl.where(b1, tl.where(b0, VALUE[11], VALUE[10]), tl.where(b0, VALUE[9], VALUE[8]))
    q3 = tl.where(b1, tl.where(b0, VALUE[15], VALUE[14]), tl.where(b0, VALUE[13], VALUE[12]))
    value = tl.where((code & 8) != 0, tl.where(b2, q3, q2), tl.where(b2, q1, q0))
    ZERO: tl.constexpr = NEGATIVE_ZERO[codes_of(LAYOUT)]
    if ZERO is not None:
        value = tl.where(code == ZERO, value * -1.0, value)
    return value


@triton.jit
def decode(packed, dtype: tl.constexpr, LAYOUT: tl.constexpr):
    """The unscaled values [.., 2 width] of the codes in `packed`, uint8 [.., width].

    `dtype`: tl.float32 (exact), tl.bfloat16 or tl.float16 (times `decode_scale`, rounded once).
    """
    CODES: tl.constexpr = codes_of(LAYOUT)
    if targets_ptx():
        if dtype == tl.float32:
            high, low = tl.inline_asm_elementwise(
                DECODE_F32[CODES], PTX_OF_8, [packed], (tl.float32, tl.float32), True, 4
            )
        else:
            # Both values of a byte in one word: unpacking costs no instruction.
            ASM: tl.constexpr = DECODE_BF16[CODES] if dtype == tl.bfloat16 else DECODE_F16[CODES]
            pair = tl.inline_asm_elementwise(ASM, PTX_OF_4, [packed], tl.uint32, True, 4)
            high = (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
            low = (pair >> 16).to(tl.uint16).to(dtype, bitcast=True)
    elif targets_amd():
        wide = packed.to(tl.uint16)  # LLVM does not take four bytes in one operand
        # The last two results are scratch registers.
        if dtype == tl.float32:
            high, low, _, _ = tl.inline_asm_elementwise(
                PERM_F32[CODES], PERM_OF_4, [wide], (tl.float32, tl.float32, tl.uint32, tl.uint32), True, 4
            )
        elif dtype == tl.bfloat16:
            high, low, _, _ = tl.inline_asm_elementwise(
                PERM_BF16[CODES], PERM_OF_2, [wide], (tl.bfloat16, tl.bfloat16, tl.uint32, tl.uint32), True, 4
            )
        else:
            high, low, _, _ = tl.inline_asm_elementwise(
                PERM_F16[CODES], PERM_OF_2, [wide], (tl.float16, tl.float16, tl.uint32, tl.uint32), True, 4
            )
    else:
        codes = packed.to(tl.int32)
        high = (value_of(codes >> 4, LAYOUT) * decode_scale(dtype, LAYOUT)).to(dtype)
        low = (value_of(codes & 15, LAYOUT) * decode_scale(dtype, LAYOUT)).to(dtype)
    return tl.interleave(high, low)


@triton.jit
def decode_split(packed, LAYOUT: tl.constexpr):
    """The codes in `packed`, uint8 [.., width], as two float16 tensors [.., 2 width] whose sum is the value
    times `SPLIT_SCALE`, to one ulp of fp32."""
    CODES: tl.constexpr = codes_of(LAYOUT)
    if targets_ptx():
        # Not marked pure: for use in two layouts the compiler would decode twice.
        high_pair, low_pair = tl.inline_asm_elementwise(
            DECODE_SPLIT[CODES], PTX_OF_8, [packed], (tl.uint32, tl.uint32), False, 4
        )
        first = (high_pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        second = (high_pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        first_rest = (low_pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        second_rest = (low_pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    elif targets_amd():
        first, second, first_rest, second_rest, _, _ = tl.inline_asm_elementwise(
            PERM_SPLIT[CODES],
            PERM_OF_4,
            [packed.to(tl.uint16)],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.uint32, tl.uint32),
            True,
            4,
        )
    else:
        codes = packed.to(tl.int32)
        a = value_of(codes >> 4, LAYOUT) * SPLIT_SCALE_F32
        b = value_of(codes & 15, LAYOUT) * SPLIT_SCALE_F32
        first, second = a.to(tl.float16), b.to(tl.float16)
        first_rest = (a - first.to(tl.float32)).to(tl.float16)
        second_rest = (b - second.to(tl.float32)).to(tl.float16)
    return tl.interleave(first, second), tl.interleave(first_rest, second_rest)


@triton.jit
def decode_scale(dtype: tl.constexpr, LAYOUT: tl.constexpr):
    """The factor of `decode` for `dtype`."""
    if dtype == tl.float32:
        return 1.0
    elif dtype == tl.bfloat16:
        return DECODE_SCALE_BF16[codes_of(LAYOUT)]
    else:
        return DECODE_SCALE_F16[codes_of(LAYOUT)]


@triton.jit
def load_packed_absmax(weight, block, mask):
    """The stored scale of `block`, int64 of any shape, for `absmax_of`. `weight`: `Pointers` (nf4.py)."""
    if weight.absmax2 is None:
        value = tl.load(weight.absmax + block, mask=mask, other=0.0)
        scale = value
    else:
        value = tl.load(weight.absmax + block, mask=mask, other=0)
        if weight.offset is None:
            scale = value
        else:
            scale = tl.load(weight.absmax2 + (block >> 8), mask=mask, other=0.0)
    return value, scale


@triton.jit
def absmax_of(weight, value, scale):
    """The scale, fp32; bit-equal to the format when the kernel is launched with enable_fp_fusion=False."""
    if weight.offset is not None:
        value = tl.load(weight.dynamic_map + value.to(tl.int32)) * scale + tl.load(weight.offset)
    elif weight.absmax2 is not None:
        value = tl.load(weight.absmax2 + value.to(tl.int32))
    return value


@triton.jit
def load_absmax(weight, block, mask):
    """The scale of `block`; 0 where `mask` is false."""
    value, scale = load_packed_absmax(weight, block, mask)
    return tl.where(mask, absmax_of(weight, value, scale), 0.0)


@triton.jit
def load_elements(weight, element, mask, LAYOUT: tl.constexpr):
    """The fp32 values of single elements (int64 indices), for rows that begin inside a byte or block. 0 where
    `mask` is false."""
    byte = tl.load(weight.packed + (element >> 1), mask=mask, other=0).to(tl.int32)
    code = tl.where((element & 1) == 0, byte >> 4, byte & 15)
    value = value_of(code, LAYOUT)
    return tl.where(mask, value * load_absmax(weight, element >> block_shift(LAYOUT), mask), 0.0)
