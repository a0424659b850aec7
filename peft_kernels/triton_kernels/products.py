"""What products share: their precision, tiles of results, and sums that are cut into splits.

Splits leave parts in fp32, which are put together in a fixed order: the same bits every time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import VARYING, cdiv, config, launch, power_of_2, takes_ptx

SUM_PARTS = config(4, 3)
ELEMENTS = 1024  # of a program

PROGRAMS_PER_PROCESSOR = 4
LEAST_DEPTH = 512  # of a split's sum


@triton.jit
def dot(a, b, result: tl.constexpr, acc=None):
    """acc + a b, summed in fp32. `result` is the type that the sums are rounded to in the end.

    How numbers are multiplied:

    - both of one 16-bit type: as they are. Their products are exact in fp32;
    - fp32 by fp32 or by 16 bits, for a result in fp32: as good as in fp32. Beside bfloat16 the fp32 number,
      `b`, is the sum of three of bfloat16. float16 would be rounded by that, but NVIDIA's tensor cores take
      tf32 numbers, in parts too; others multiply in fp32;
    - the same for a result of 16 bits: by sixteen bits of each fp32 number, the sum of two of bfloat16. The
      product of the two low parts is left out. That is far better than such a result shows.
    """
    if a.dtype == b.dtype and (a.dtype != tl.float32 or result == tl.float32):
        acc = tl.dot(a, b, acc, input_precision="ieee")
    elif result != tl.float32:
        if a.dtype != tl.bfloat16:
            a = a.to(tl.float32)
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a_high, b_low, acc)
        if a.dtype != tl.bfloat16:
            a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_high, acc)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, acc)))
    elif takes_ptx():
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
    return acc


@triton.jit
def store_tile(out_ptr, values, token, m, feature, features):
    """values [features, tokens] to out [m, features], rounded once; of each split to its own such part."""
    at = out_ptr + token.to(tl.int64)[None, :] * features + feature[:, None]
    if out_ptr.dtype.element_ty == tl.float32:  # as parts are
        at += tl.program_id(1).to(tl.int64) * m * features
    inside = (feature < features)[:, None] & (token < m)[None, :]
    tl.store(at, values.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Split:
    """How a sum is cut, and where its parts are."""

    units: int  # of a part
    count: int
    target: Tensor  # what the kernel writes: `out`, or parts of it [count, rows, cols] in fp32
    out: Tensor

    def finish(self) -> None:
        """Put the parts together, if there are several."""
        if self.count == 1:
            return
        rows, cols = self.out.shape
        block_cols = min(power_of_2(cols), ELEMENTS)
        block_rows = ELEMENTS // block_cols
        grid = (cdiv(rows, block_rows) * cdiv(cols, block_cols),)
        args = self.target, self.out, rows, cols, self.out.stride(0), self.count
        blocks = {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
        launch(sum_parts_kernel, grid, *args, config=SUM_PARTS, **blocks)


def split_sum(programs: int, depth: int, unit: int, out: Tensor) -> Split:
    """Cut the sums over `depth` that make out [rows, cols], so that all processors work.

    `programs` are what there are without it, a part is a multiple of `unit`, and rows of `out` may lie apart.
    The order of sums depends on shapes and the card's size alone.
    """
    splits = max(processors(out.device) * PROGRAMS_PER_PROCESSOR // max(programs, 1), 1)
    units = cdiv(cdiv(depth, splits), unit)
    units = max(units, cdiv(min(LEAST_DEPTH, depth), unit), 1)
    count = max(cdiv(depth, units * unit), 1)
    target = out if count == 1 else out.new_empty((count, *out.shape), dtype=torch.float32)
    return Split(units, count, target, out)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors, or compute units, of a card; where there is none, few."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=VARYING)
def sum_parts_kernel(
    parts_ptr, out_ptr, rows, cols, row_stride, splits, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """out[rows, cols], whose rows may lie apart, = the sum over parts[splits, rows, cols], rounded once."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(0) % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    inside = (row < rows) & (col < cols)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    at = parts_ptr + row * cols + col
    for _ in range(splits):
        total += tl.load(at, mask=inside, other=0.0)
        at += tl.cast(rows, tl.int64) * cols
    tl.store(out_ptr + row * row_stride + col, total.to(out_ptr.dtype.element_ty), mask=inside)
