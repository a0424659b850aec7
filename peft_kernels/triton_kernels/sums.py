"""Sums that are cut into splits, and put together in a fixed order: the same bits every time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

CONFIGS = [triton.Config({}, num_warps=4)]
ELEMENTS = 1024  # of a program


PROGRAMS_PER_PROCESSOR = 4
LEAST_DEPTH = 512  # of a split's sum


@dataclass(frozen=True)
class Split:
    """How a sum is cut, and where its parts are."""

    depth: int  # of a part
    count: int
    target: Tensor  # what the kernel writes: `out`, or parts of it [count, rows, cols] in fp32
    out: Tensor

    def finish(self) -> None:
        """Put the parts together, if there are several."""
        if self.count > 1:
            sum_parts(self.target, self.out)


def split_sum(programs: int, depth: int, unit: int, out: Tensor) -> Split:
    """Cut the sums over `depth` that make out [rows, cols], so that all processors work.

    `programs` are what there are without it, a part is a multiple of `unit`, and rows of `out` may lie apart.
    The order of sums depends on shapes and the card's size alone.
    """
    splits = max(processors(out.device) * PROGRAMS_PER_PROCESSOR // max(programs, 1), 1)
    units = triton.cdiv(triton.cdiv(depth, splits), unit)
    part = max(units, triton.cdiv(min(LEAST_DEPTH, depth), unit), 1) * unit
    count = max(triton.cdiv(depth, part), 1)
    target = out if count == 1 else out.new_empty((count, *out.shape), dtype=torch.float32)
    return Split(part, count, target, out)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors, or compute units, of a card; where there is none, few."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def sum_parts_kernel(
    parts,
    out,
    rows,
    cols,
    row_stride,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[row, col] = the sum over parts[split, row, col], rounded once."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(0) % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    inside = (row < rows) & (col < cols)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    part = parts + row * cols + col
    for _ in range(splits):
        total += tl.load(part, mask=inside, other=0.0)
        part += tl.cast(rows, tl.int64) * cols
    tl.store(out + row * row_stride + col, total.to(out.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Into out [rows, cols], whose rows may lie apart, from parts [splits, rows, cols] in fp32."""
    splits, rows, cols = parts.shape
    block_cols = min(triton.next_power_of_2(cols), ELEMENTS)
    block_rows = ELEMENTS // block_cols
    launch(
        sum_parts_kernel,
        lambda meta: (triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols),),
        parts,
        out,
        rows,
        cols,
        out.stride(0),
        splits,
        configs=CONFIGS,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
    )
