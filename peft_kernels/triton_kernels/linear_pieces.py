"""Products of many rows with an NF4 weight: it is dequantised, piece by piece, for torch's product.

A piece is small enough to be still in the cache of the card when its product reads it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Nf4
from .decode import decode, load_absmax
from .launch import launch
from .linear_tiles import load_elements

PIECE_BYTES = 16 << 20
UNIT = 256  # rows or columns: whole tiles of torch's product
CONFIGS = [triton.Config({"BLOCK_ROWS": 16, "BLOCK_COLS": 256}, num_warps=8)]


@triton.jit
def piece_kernel(
    packed,
    absmax,
    absmax2,
    offset,
    dynamic_map,
    out,
    first_row,
    rows,
    first_col,
    cols,
    k,
    out_stride,
    BLOCK_SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Part of a weight [.., k] into out. ALIGNED: k and first_col are multiples of RUN, and that divides the
    blocksize, 2^BLOCK_SHIFT."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row = tl.program_id(0) // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(0) % col_tiles * BLOCK_COLS
    col = first + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    start = (first_row + row).to(tl.int64) * k + first_col
    if ALIGNED:
        RUNS: tl.constexpr = BLOCK_COLS // RUN
        half = first // 2 + tl.arange(0, BLOCK_COLS // 2)
        there = (row < rows)[:, None] & (2 * half < cols)[None, :]
        numbers = decode(
            tl.load(packed + (start >> 1)[:, None] + half[None, :], mask=there, other=0), tl.float32, PTX
        )
        run = first + RUN * tl.arange(0, RUNS)
        there = (row < rows)[:, None] & (run < cols)[None, :]
        block = (start[:, None] + run[None, :]) >> BLOCK_SHIFT
        scales = load_absmax(absmax, absmax2, offset, dynamic_map, block, there)
        weights = tl.reshape(numbers, (BLOCK_ROWS, RUNS, RUN)) * scales[:, :, None]
        weights = tl.reshape(weights, (BLOCK_ROWS, BLOCK_COLS))
    else:
        element = start[:, None] + col[None, :]
        weights = load_elements(packed, absmax, absmax2, offset, dynamic_map, element, inside, BLOCK_SHIFT)
    at = out + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(at, weights.to(out.dtype.element_ty), mask=inside)


def dequantize_part(weight: Nf4, k: int, rows: range, cols: range, out: Tensor) -> None:
    """Rows and columns of a weight [.., k] into out [rows, cols], whose rows may lie apart."""
    run = next((run for run in (64, 32) if k % run == cols.start % run == weight.blocksize % run == 0), 0)
    launch(
        piece_kernel,
        lambda meta: (
            triton.cdiv(len(rows), meta["BLOCK_ROWS"]) * triton.cdiv(len(cols), meta["BLOCK_COLS"]),
        ),
        *weight[:5],
        out,
        rows.start,
        len(rows),
        cols.start,
        len(cols),
        k,
        out.stride(0),
        configs=CONFIGS,
        BLOCK_SHIFT=weight.blocksize.bit_length() - 1,
        RUN=run,
        ALIGNED=run > 0,
    )


def pieces(count: int, length: int, itemsize: int) -> Iterator[range]:
    """`count` rows or columns of `length` elements in equal pieces, multiples of UNIT but for the last."""
    most = max(PIECE_BYTES // (max(length, 1) * itemsize) // UNIT, 1) * UNIT
    number = max(triton.cdiv(count, most), 1)
    size = triton.cdiv(triton.cdiv(count, number), UNIT) * UNIT
    for begin in range(0, count, size):
        yield range(begin, min(begin + size, count))


def forward_by_pieces(x: Tensor, weight: Nf4, n: int, bias: Tensor | None) -> Tensor:
    """y [m, n] of x [m, k], contiguous."""
    k = x.shape[1]
    y = x.new_empty(x.shape[0], n)
    bias = None if bias is None else bias.to(x.dtype)
    for rows in pieces(n, k, x.element_size()):
        piece = x.new_empty(len(rows), k)
        dequantize_part(weight, k, rows, range(k), piece)
        out = y[:, rows.start : rows.stop]
        if bias is None:
            torch.mm(x, piece.t(), out=out)
        else:
            torch.addmm(bias[rows.start : rows.stop], x, piece.t(), out=out)
    return y


def backward_by_pieces(dy: Tensor, weight: Nf4, k: int) -> Tensor:
    """dx [m, k] of dy [m, n], contiguous."""
    n = dy.shape[1]
    dx = dy.new_empty(dy.shape[0], k)
    for cols in pieces(k, n, dy.element_size()):
        piece = dy.new_empty(n, len(cols))
        dequantize_part(weight, k, range(n), cols, piece)
        torch.mm(dy, piece, out=dx[:, cols.start : cols.stop])
    return dx
