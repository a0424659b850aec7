"""Codes of the dynamic maps, in which optimizers keep moments in 8 bits (ops/optim.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.code_tables import dynamic_thresholds, moment_values
from ..core.launch import targets_ptx


class Codes(NamedTuple):
    """A dynamic map for kernels."""

    table: Tensor  # fp32 [256]; not `values`, an attribute of Triton's tuples
    midpoints: Tensor  # fp32 [255]


def codes_on(device: torch.device, signed: bool) -> Codes:
    return Codes(moment_values(device, signed), dynamic_thresholds(device, signed))


LOG10_2 = math.log10(2)
# The decade from the bits of fp32: ((bits >> 15) * DECADE_SLOPE + DECADE_START) / 2^23. 0.0465 centres the
# error.
DECADE_SLOPE = tl.constexpr(round(LOG10_2 * 2**15))
DECADE_START = tl.constexpr(round((7 + (0.0465 - 127) * LOG10_2) * 2**23))
LOG2_5 = tl.constexpr(math.log2(5))
SLOPE = tl.constexpr(math.log2(1e6 / 0.9))
ZERO = tl.constexpr(127)  # the signed map's code of 0.0


@triton.jit
def lookup(table, index):
    """table[index], fp32. Inline PTX, because the compiler distributes loads from unknown addresses badly
    over threads."""
    if targets_ptx():
        address = table.to(tl.int64) + index.to(tl.int64) * 4
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [address], tl.float32, True, 1
        )
    else:
        found = tl.load(table + index)
    return found


@triton.jit
def code_value(codes, code):
    """Values of codes, uint8."""
    return lookup(codes.table, code.to(tl.int32))


@triton.jit
def nearest_code(codes, x, SIGNED: tl.constexpr):
    """The number of midpoints of the map below x: the nearest code, the lower one on a tie. |x| is at most 1,
    up to rounding.

    Decade d, from 10^(d - 7) to 10^(d - 6), has 2^d evenly spaced magnitudes (2^(d + 1) in the unsigned map).
    So within a decade the nearest midpoint is a linear function of x. Its rounding error, 1e-3 of a step, is
    far below the half step that would matter, so x is compared with that midpoint only. The decade is found
    from a logarithm made from x's bits, which is off by at most 6 percent of x, and by less than 3 percent at
    powers of ten. There the lines of both decades find the same midpoint, within half a step.
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
    return index + tl.where(x > lookup(codes.midpoints, index), 1, 0)
