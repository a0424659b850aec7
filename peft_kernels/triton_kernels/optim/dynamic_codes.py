"""Codes of the dynamic maps, by which optimizers' moments are kept in 8 bits (ops/adamw.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.code_tables import dynamic_thresholds, moment_values
from ..core.launch import takes_ptx


class Codes(NamedTuple):
    """A dynamic map for kernels."""

    numbers: Tensor  # fp32 [256]
    midpoints: Tensor  # fp32 [255]


def codes_on(device: torch.device, signed: bool) -> Codes:
    return Codes(moment_values(device, signed), dynamic_thresholds(device, signed))


LOG10_2 = math.log10(2)
# A decade by bits of fp32: (bits >> 15) * DECADE_SLOPE + DECADE_START, over 2^23. 0.0465 centres its error.
DECADE_SLOPE = tl.constexpr(round(LOG10_2 * 2**15))
DECADE_START = tl.constexpr(round((7 + (0.0465 - 127) * LOG10_2) * 2**23))
LOG2_5 = tl.constexpr(math.log2(5))
SLOPE = tl.constexpr(math.log2(1e6 / 0.9))
ZERO = tl.constexpr(127)  # the signed map's code of 0.0


@triton.jit
def looked_up(table, index):
    """table[index], fp32. Which threads make a load is up to the compiler, which chooses badly where it knows
    nothing of the addresses."""
    if takes_ptx():
        address = table.to(tl.int64) + index.to(tl.int64) * 4
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [address], tl.float32, True, 1
        )
    else:
        found = tl.load(table + index)
    return found


@triton.jit
def number_of(codes, code):
    """What codes, uint8, mean."""
    return looked_up(codes.numbers, code.to(tl.int32))


@triton.jit
def code_of(codes, x, SIGNED: tl.constexpr):
    """How many midpoints of the map x exceeds: the nearest code, the lower one on a tie. |x| is 1 at most,
    but for a rounding.

    Decade d, from 10^(d - 7) to 10^(d - 6), has 2^d evenly spaced magnitudes, twice as many in the unsigned
    map. So the decade tells a line, and the line which midpoint is nearest, with 1e-3 lost to rounding where
    half of it would do: x is compared with that midpoint alone. The number's own bits, of which a logarithm
    is made that errs by 6 percent of x at most, tell the decade: at powers of ten it errs by less than 3.
    Near those the lines of both decades find the same midpoint, as far as half the distance to the next.
    """
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    decade = tl.minimum(tl.maximum((bits >> 15) * DECADE_SLOPE + DECADE_START, 0) >> 23, 6)
    slope = tl.exp2(SLOPE - LOG2_5 * decade.to(tl.float32))
    if SIGNED:
        size = 1 << decade
        line = tl.fma(size.to(tl.float32), 8 / 9, magnitude * slope)
        nearest = tl.minimum((line + 0.5).to(tl.int32), 2 * size)
        index = tl.where(x < 0.0, ZERO - nearest, ZERO - 1 + nearest)
    else:
        size = 2 << decade
        line = tl.fma(size.to(tl.float32), 8 / 9, magnitude * (2 * slope))
        index = tl.minimum((line - 0.5).to(tl.int32), 2 * size - 1) - 1
    index = tl.maximum(index, 0)
    return index + tl.where(x > looked_up(codes.midpoints, index), 1, 0)
