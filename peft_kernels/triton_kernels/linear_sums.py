"""The second phase of sums that are cut into splits: in a fixed order, for the same bits every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

CONFIGS = [triton.Config({}, num_warps=4)]
ELEMENTS = 1024  # of a program


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


def empty_parts(splits: int, rows: int, cols: int, like: Tensor) -> Tensor:
    return torch.empty((splits, rows, cols), dtype=torch.float32, device=like.device)
