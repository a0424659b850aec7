"""GEMMs of many rows with a packed weight, which is dequantised piece by piece for torch's GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.launch import VARYING, cdiv, config, launch
from ..nf4.nf4_decode import block_shift, decode, load_absmax, load_elements
from ..nf4.nf4_groups import dequantize_groups
from ..nf4.nf4_weight import Nf4

MOST_BYTES = 128 << 20  # of a piece of a weight
UNIT = 256  # rows or columns of the weight: whole tiles of torch's GEMM
PIECE = config(8, 3, BLOCK_ROWS=16, BLOCK_COLS=256)


@triton.jit(do_not_specialize=VARYING)
def piece_kernel(
    weight,
    out_ptr,
    first_row,
    rows,
    first_col,
    cols,
    k,
    out_stride,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Dequantise part of a weight [.., k] to out. k and first_col are multiples of RUN, which divides the
    blocksize; with RUN 0 elements are read one by one."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row = tl.program_id(0) // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(0) % col_tiles * BLOCK_COLS
    col = first + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    start = (first_row + row).to(tl.int64) * k + first_col
    if RUN == 0:
        weights = load_elements(weight, start[:, None] + col[None, :], inside, LAYOUT)
    else:
        RUNS: tl.constexpr = BLOCK_COLS // RUN
        half = first // 2 + tl.arange(0, BLOCK_COLS // 2)
        there = (row < rows)[:, None] & (2 * half < cols)[None, :]
        packed = tl.load(weight.packed + (start >> 1)[:, None] + half[None, :], mask=there, other=0)
        run = first + RUN * tl.arange(0, RUNS)
        there = (row < rows)[:, None] & (run < cols)[None, :]
        scales = load_absmax(weight, (start[:, None] + run[None, :]) >> block_shift(LAYOUT), there)
        weights = tl.reshape(decode(packed, tl.float32, LAYOUT), (BLOCK_ROWS, RUNS, RUN)) * scales[:, :, None]
        weights = tl.reshape(weights, (BLOCK_ROWS, BLOCK_COLS))
    at = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(at, weights.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_part(weight: Nf4, k: int, rows: range, cols: range, out: Tensor) -> None:
    """Dequantises rows and columns of a weight [.., k] to out [rows, cols], of any row stride."""
    if not weight.is_fused:
        return dequantize_groups(weight, k, rows, cols, out[None])
    tiles = cdiv(len(rows), PIECE["BLOCK_ROWS"]) * cdiv(len(cols), PIECE["BLOCK_COLS"])
    constants = {"LAYOUT": weight.layout, "RUN": weight.run_from(k, cols.start) or 0}
    args = rows.start, len(rows), cols.start, len(cols), k, out.stride(0)
    launch(piece_kernel, (tiles,), weight.pointers, out, *args, config=PIECE, **constants)


def pieces(count: int, length: int, itemsize: int, most_bytes: int = MOST_BYTES) -> Iterator[range]:
    """Splits `count` rows or columns of `length` elements into equal pieces; all but the last are multiples
    of UNIT."""
    size = piece_size(count, length, itemsize, most_bytes)
    for begin in range(0, count, size):
        yield range(begin, min(begin + size, count))


def piece_size(count: int, length: int, itemsize: int, most_bytes: int = MOST_BYTES) -> int:
    """Size of the fewest equal pieces within `most_bytes`: each costs two launches, and large ones fill the
    card.

    csrc/cuda/linear/linear_plan.cpp has the same rule."""
    most = max(most_bytes // (max(length, 1) * itemsize) // UNIT, 1) * UNIT
    number = max(cdiv(count, most), 1)
    return max(cdiv(cdiv(count, number), UNIT), 1) * UNIT


def forward_by_pieces(x: Tensor, weight: Nf4, n: int, bias: Tensor | None) -> Tensor:
    """y [m, n] = x [m, k] W^T + bias. x is contiguous."""
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
    """dx [m, k] = dy [m, n] W. dy is contiguous."""
    n = dy.shape[1]
    dx = dy.new_empty(dy.shape[0], k)
    for cols in pieces(k, n, dy.element_size()):
        piece = dy.new_empty(n, len(cols))
        dequantize_part(weight, k, range(n), cols, piece)
        torch.mm(dy, piece, out=dx[:, cols.start : cols.stop])
    return dx
