"""NF4 codes and double-quantised absmax to numbers, inside kernels."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..code_tables import NF4_CODE


def _asm(encode: Callable[[float], bytes]) -> str:
    """PTX that looks up the eight codes of four packed bytes.

    `encode` gives a number as its bytes. The table of 16 numbers is cut into planes, one for each of their
    bytes. `prmt` picks four entries of half a plane by the low three bits of four codes; another `prmt` picks
    between the two halves by the codes' high bits.
    """
    entries = [encode(value) for value in NF4_CODE]
    size = len(entries[0])
    outputs = size  # registers for the four high codes, and as many for the four low ones
    packed = f"${2 * outputs}"
    lines = [
        ".reg .b32 low<2>, high<2>, first, second, plane<4>, part<4>;",
        f"and.b32 low0, {packed}, 0x77777777;",
        f"shr.u32 high0, {packed}, 1;",
        "and.b32 high0, high0, 0x44444444;",
        "or.b32 high0, high0, 0x32103210;",
        "shr.u32 low1, low0, 16;",
        "shr.u32 high1, high0, 16;",
    ]
    for half in range(2):  # two bytes, whose codes are, in order: low, high, low, high
        for plane in range(size):
            words = [
                int.from_bytes(bytes(entry[plane] for entry in entries[i : i + 4]), "little")
                for i in range(0, 16, 4)
            ]
            lines += [
                f"prmt.b32 first, {words[0]:#x}, {words[1]:#x}, low{half};",
                f"prmt.b32 second, {words[2]:#x}, {words[3]:#x}, low{half};",
                f"prmt.b32 plane{plane}, first, second, high{half};",
            ]
        if size == 2:
            lines += [
                f"prmt.b32 ${half}, plane0, plane1, 0x7351;",
                f"prmt.b32 ${outputs + half}, plane0, plane1, 0x6240;",
            ]
        else:
            lines += [
                "prmt.b32 part0, plane0, plane1, 0x5140;",
                "prmt.b32 part1, plane0, plane1, 0x7362;",
                "prmt.b32 part2, plane2, plane3, 0x5140;",
                "prmt.b32 part3, plane2, plane3, 0x7362;",
                f"prmt.b32 ${outputs + 2 * half}, part0, part2, 0x5410;",
                f"prmt.b32 ${2 * half}, part0, part2, 0x7632;",
                f"prmt.b32 ${outputs + 2 * half + 1}, part1, part3, 0x5410;",
                f"prmt.b32 ${2 * half + 1}, part1, part3, 0x7632;",
            ]
    return "{ " + " ".join(lines) + " }"


def _bytes_of(dtype: torch.dtype) -> Callable[[float], bytes]:
    def encode(value: float) -> bytes:
        return bytes(torch.tensor([value], dtype=dtype).view(torch.uint8).tolist())

    return encode


def _single(value: float) -> bytes:
    return struct.pack("<f", value)


CODE = tl.constexpr(NF4_CODE)
DECODE_F32 = tl.constexpr(_asm(_single))
DECODE_BF16 = tl.constexpr(_asm(_bytes_of(torch.bfloat16)))
DECODE_F16 = tl.constexpr(_asm(_bytes_of(torch.float16)))


@triton.jit
def value_of(code):
    """The numbers of 4-bit codes, int32: fp32, exact. Four levels of selection; for any target."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    q0 = tl.where(b1, tl.where(b0, CODE[3], CODE[2]), tl.where(b0, CODE[1], CODE[0]))
    q1 = tl.where(b1, tl.where(b0, CODE[7], CODE[6]), tl.where(b0, CODE[5], CODE[4]))
    q2 = tl.where(b1, tl.where(b0, CODE[11], CODE[10]), tl.where(b0, CODE[9], CODE[8]))
    q3 = tl.where(b1, tl.where(b0, CODE[15], CODE[14]), tl.where(b0, CODE[13], CODE[12]))
    return tl.where((code & 8) != 0, tl.where(b2, q3, q2), tl.where(b2, q1, q0))


@triton.jit
def decode(packed, dtype: tl.constexpr, PTX: tl.constexpr):
    """The two codes in each byte of `packed`, uint8 of any shape, as numbers in [-1, 1], not yet scaled.

    Returns (high, low), of the shape of `packed`: elements 2 i and 2 i + 1 of the weight for byte i. `dtype`
    is tl.float32 (exact), tl.bfloat16 or tl.float16 (each number rounded once). `PTX`: whether that is what
    the target takes; `launch` knows.
    """
    if PTX:
        if dtype == tl.float32:
            high, low = tl.inline_asm_elementwise(
                DECODE_F32, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed], (tl.float32, tl.float32), True, 4
            )
        elif dtype == tl.bfloat16:
            high, low = tl.inline_asm_elementwise(
                DECODE_BF16, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            high, low = tl.inline_asm_elementwise(
                DECODE_F16, "=r,=r,=r,=r,r", [packed], (tl.float16, tl.float16), True, 4
            )
    else:
        codes = packed.to(tl.int32)
        high = value_of(codes >> 4).to(dtype)
        low = value_of(codes & 15).to(dtype)
    return high, low


@triton.jit
def load_absmax(absmax, absmax2, offset, dynamic_map, block, mask):
    """The absmax, fp32, of `block`, int64 of any shape; 0 where `mask` is false.

    The pointers are those of an `Nf4` (common.py); absmax2, offset and dynamic_map are None for a weight
    without double quantisation. Equal to the format to the bit when the kernel is launched with
    enable_fp_fusion=False.
    """
    if absmax2 is None:
        value = tl.load(absmax + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax2 + (block >> 8), mask=mask, other=0.0)
        value = tl.load(dynamic_map + code) * scale + tl.load(offset)
        value = tl.where(mask, value, 0.0)
    return value
