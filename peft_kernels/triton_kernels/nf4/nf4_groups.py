"""Dequantises int4 with its zero points, E4M3 and int8, bit-equal to the reference. GEMMs do not read them
packed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.code_tables import ZERO_POINT
from ...core.formats import FORMATS
from ..core.launch import VARYING, cdiv, config, launch
from .nf4_decode import block_shift, codes_of
from .nf4_weight import Nf4

GROUPS = config(8, 3, BLOCK_ROWS=16, BLOCK_COLS=256)

ZERO = tl.constexpr(ZERO_POINT)
INT4 = tl.constexpr(FORMATS["int4"].codes)
E4M3 = tl.constexpr(FORMATS["fp8"].codes)


@triton.jit
def e4m3_value(code):
    """The fp32 values of codes (int32) of E4M3, but for its NaN. As float16 their bits are 2^-8 of the value,
    subnormal ones too."""
    bits = (code & 0x7F) << 7 | (code & 0x80) << 8
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit(do_not_specialize=VARYING)
def groups_kernel(
    weight,
    out_ptr,
    first_row,
    rows,
    first_col,
    cols,
    k,
    nbytes,
    nblocks,
    out_weight_stride,
    out_stride,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Dequantise the same part of several weights [.., k] to out. A weight has nbytes bytes of codes and
    nblocks scales. k and first_col are multiples of RUN, which divides the blocksize; 1 takes any part."""
    RUNS: tl.constexpr = BLOCK_COLS // RUN
    tile, index = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row = tile // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tile % col_tiles * BLOCK_COLS
    col = first + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    start = (first_row + row) * k + first_col
    packed = weight.packed + index * nbytes

    run = first + RUN * tl.arange(0, RUNS)
    there = (row < rows)[:, None] & (run < cols)[None, :]
    if codes_of(LAYOUT) == INT4:
        block = (start[:, None] + run[None, :]) >> block_shift(LAYOUT)
    elif block_shift(LAYOUT) < 0:  # each row has a scale
        block = tl.broadcast_to((first_row + row)[:, None], (BLOCK_ROWS, RUNS))
    else:
        SHIFT: tl.constexpr = block_shift(LAYOUT)
        ROW_SHIFT: tl.constexpr = SHIFT if codes_of(LAYOUT) == E4M3 else 0
        in_row = tl.cdiv(k, 1 << SHIFT)
        block = ((first_row + row) >> ROW_SHIFT)[:, None] * in_row + ((first_col + run) >> SHIFT)[None, :]
    block += index * nblocks
    scale = tl.load(weight.absmax + block, mask=there, other=0.0).to(tl.float32)

    if codes_of(LAYOUT) != INT4:
        code = tl.load(packed + start[:, None] + col[None, :], mask=inside, other=0)
        if codes_of(LAYOUT) == E4M3:
            values = e4m3_value(code.to(tl.int32))
        else:
            values = code.to(tl.int8, bitcast=True).to(tl.float32)
        values = tl.reshape(values, (BLOCK_ROWS, RUNS, RUN))
    else:
        if RUN == 1:
            element = start[:, None] + col[None, :]
            byte = tl.load(packed + (element >> 1), mask=inside, other=0).to(tl.int32)
            code = tl.where((element & 1) == 0, byte >> 4, byte & 15)
        else:
            half = first // 2 + tl.arange(0, BLOCK_COLS // 2)
            both = (row < rows)[:, None] & (2 * half < cols)[None, :]
            byte = tl.load(packed + (start >> 1)[:, None] + half[None, :], mask=both, other=0).to(tl.int32)
            code = tl.interleave(byte >> 4, byte & 15)
        code = tl.reshape(code, (BLOCK_ROWS, RUNS, RUN))
        if weight.offset is None:
            code -= ZERO
        else:
            code -= tl.load(weight.offset + block, mask=there, other=0).to(tl.int32)[:, :, None]
        values = code.to(tl.float32)
    values = tl.reshape(values * scale[:, :, None], (BLOCK_ROWS, BLOCK_COLS))
    at = out_ptr + index * out_weight_stride + row[:, None] * out_stride + col[None, :]
    tl.store(at, values.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_groups(weight: Nf4, k: int, rows: range, cols: range, out: Tensor) -> None:
    """Dequantises rows and columns of each weight [.., k] to out [weights, rows, cols]; columns of out are
    adjacent."""
    pointers, count = weight.pointers, out.shape[0]
    assert pointers.packed is not None and pointers.absmax is not None
    tiles = cdiv(len(rows), GROUPS["BLOCK_ROWS"]) * cdiv(len(cols), GROUPS["BLOCK_COLS"])
    part = rows.start, len(rows), cols.start, len(cols)
    sizes = k, pointers.packed.numel() // count, pointers.absmax.numel() // count, *out.stride()[:2]
    constants = {"LAYOUT": weight.layout, "RUN": weight.run_from(k, cols.start) or 1}
    launch(groups_kernel, (tiles, count), pointers, out, *part, *sizes, config=GROUPS, **constants)
