"""The norms of the rows of W + s B A: ||w + s b A||^2 = w . w + s (2 w A^T + s b A A^T) . b.

Only w . w and w A^T take a pass over the weight; they are as accurate as fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.common import check, check_float, check_shape
from ..core.gemm import add_dot, dot, split_k
from ..core.launch import VARYING, cdiv, config, launch, power_of_2, targets_amd, targets_ptx
from ..linear.linear import run_length
from ..linear.linear_kernels import load_any
from ..linear.linear_pieces import dequantize_part, pieces
from ..nf4.nf4_decode import SPLIT_SCALE, absmax_of, block_shift, decode_split, load_packed_absmax
from ..nf4.nf4_weight import Nf4, Pointers, nf4

HALVES = config(8, 2, BLOCK_K=4096)
RUNS = config(4, 3, BLOCK_N=64)
RUNS_BY_MANY_RANKS = config(8, 3, BLOCK_N=64)
ELEMENTS = config(8, 2, BLOCK_N=64, BLOCK_K=32)

FEW_RANKS, MANY_RANKS = 32, 64  # per program
SCALE = tl.constexpr(SPLIT_SCALE)
LARGEST = tl.constexpr(127 + 14)
"""The biased fp32 exponent to which the largest value of a rank is scaled, to fit float16."""


@triton.jit
def halves_kernel(a_ptr, halves_ptr, unit_ptr, r, k, BLOCK_K: tl.constexpr):
    """Splits each rank of a[r, k] into (halves[0] + halves[1]) unit: float16 [2, r, k], unit a power of two.

    The largest value of a rank is scaled to 2^14 or more, and values down to 2^-16 of it keep 22 bits. The
    error of smaller ones is as small relative to the largest, and so relative to the norm.
    """
    rank = tl.program_id(0).to(tl.int64)
    sizes = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, k, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        sizes = tl.maximum(sizes, tl.abs(tl.load(a_ptr + rank * k + col, mask=col < k, other=0.0)))
    exponent = tl.max(sizes, axis=0).to(tl.int32, bitcast=True) >> 23
    # Keeps the factor and its inverse normal.
    exponent = tl.minimum(LARGEST + 127 - exponent, 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(unit_ptr + rank, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    for first in range(0, k, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        inside = col < k
        values = tl.load(a_ptr + rank * k + col, mask=inside, other=0.0) * factor
        high = values.to(tl.float16)
        at = halves_ptr + rank * k + col
        tl.store(at, high, mask=inside)
        tl.store(at + tl.cast(r, tl.int64) * k, (values - high.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def store_squares(squares_ptr, square, product, b_ptr, scaling, row, n, rank, r, split, part, parts):
    """Store squares[splits parts, n]: over a split of k, 2 s (W A^T) . B of a part of the ranks, plus ||W||^2
    per row in the first part."""
    there = (row < n)[:, None] & (rank < r)[None, :]
    b = tl.load(b_ptr + row.to(tl.int64)[:, None] * r + rank[None, :], mask=there, other=0.0)
    total = 2.0 * scaling * tl.sum(product * b, axis=1) + tl.where(part == 0, square, 0.0)
    tl.store(squares_ptr + (split * parts + part).to(tl.int64) * n + row, total, mask=row < n)


@triton.jit(do_not_specialize=VARYING)
def norm_of_runs_kernel(
    weight,
    halves_ptr,
    unit_ptr,
    b_ptr,
    squares_ptr,
    n,
    k,
    r,
    scaling,
    split,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`squares` of a packed weight whose rows are made of runs (linear_kernels.py). A program sums over
    `split` runs.

    Codes and A are sums of two float16 values; of their four products the smallest is dropped. Codes are
    multiplied unscaled, and the sum of each run by its absmax, so that the tensor cores' rounding
    accumulates only over a run.
    """
    tiles, parts = tl.cdiv(n, BLOCK_N), tl.cdiv(tl.maximum(r, 1), BLOCK_R)
    part = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = part * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * split * RUN
    # Indices outside are clamped, and their results not stored.
    w_rows = tl.minimum(row, n - 1).to(tl.int64) * k
    w_tile = weight.packed + (w_rows >> 1)[:, None] + (first // 2 + tl.arange(0, RUN // 2))[None, :]
    column = first + tl.arange(0, RUN)
    a_tile = halves_ptr + (rank.to(tl.int64) * k)[:, None] + column[None, :]
    a_mask = tl.broadcast_to((rank < r)[:, None], (BLOCK_R, RUN))
    rest = tl.cast(r, tl.int64) * k
    each = tl.full((BLOCK_N,), True, tl.int1)
    product = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    stored = load_packed_absmax(weight, (w_rows + first) >> block_shift(LAYOUT), each)  # loaded a run ahead
    for start in range(first, tl.minimum(first + split * RUN, k), RUN):
        scales = absmax_of(weight, stored[0], stored[1])
        ahead = w_rows + tl.minimum(start + RUN, k - RUN)
        stored = load_packed_absmax(weight, ahead >> block_shift(LAYOUT), each)
        high, low = decode_split(tl.load(w_tile), LAYOUT)
        a_high = tl.trans(tl.load(a_tile, mask=a_mask, other=0.0))
        a_low = tl.trans(tl.load(a_tile + rest, mask=a_mask, other=0.0))
        both = high.to(tl.float32) + low.to(tl.float32)
        square += tl.sum(both * both, axis=1) * (scales * scales)
        run = tl.dot(low, a_high)
        run = tl.dot(high, a_low, run)
        run = tl.dot(high, a_high, run)
        product += run * scales[:, None]
        a_tile += RUN
        w_tile += RUN // 2
    unit = tl.load(unit_ptr + rank, mask=rank < r, other=0.0) * (1.0 / SCALE)
    square *= 1.0 / (SCALE * SCALE)
    product *= unit[None, :]
    split_index = tl.program_id(1)
    store_squares(squares_ptr, square, product, b_ptr, scaling, row, n, rank, r, split_index, part, parts)


@triton.jit(do_not_specialize=VARYING)
def norm_kernel(
    weight,
    a_ptr,
    b_ptr,
    squares_ptr,
    n,
    k,
    r,
    scaling,
    split,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`squares` of any weight, dense ones too. A program sums over `split` times BLOCK_K."""
    tiles, parts = tl.cdiv(n, BLOCK_N), tl.cdiv(tl.maximum(r, 1), BLOCK_R)
    part = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = part * BLOCK_R + tl.arange(0, BLOCK_R)
    product = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    begin = tl.program_id(1) * split * BLOCK_K
    for first in range(begin, tl.minimum(begin + split * BLOCK_K, k), BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        element = row.to(tl.int64)[:, None] * k + col[None, :]
        inside = (row < n)[:, None] & (col < k)[None, :]
        w = load_any(weight, element, inside, LAYOUT)
        wide = w.to(tl.float32)
        squares += wide * wide
        at = rank.to(tl.int64)[None, :] * k + col[:, None]
        a_t = tl.load(a_ptr + at, mask=(rank < r)[None, :] & (col < k)[:, None], other=0.0)
        if w.dtype == tl.bfloat16:
            run = dot(w, a_t, tl.float32)
        elif targets_ptx():
            run = tl.dot(wide, a_t, input_precision="tf32x3")
        elif targets_amd():
            run = tl.dot(wide, a_t, input_precision="bf16x6")
        else:
            run = tl.dot(wide, a_t, input_precision="ieee")
        product = add_dot(product, run)
    # Sums squares over the loop, then across threads: the compiler would fuse products with the first
    # addition across threads, and two threads that add the same pair would round different products.
    square = tl.sum(squares, axis=1)
    split_index = tl.program_id(1)
    store_squares(squares_ptr, square, product, b_ptr, scaling, row, n, rank, r, split_index, part, parts)


def dora_norm(args: Any) -> Tensor:
    base, lora_a, lora_b, scaling = args
    dims = f"{lora_a.dim()}, {lora_b.dim()}"
    check(lora_a.dim() == lora_b.dim() == 2, "lora_a, lora_b", "2 dimensions", dims)
    (r, k), n = lora_a.shape, lora_b.shape[0]
    check_shape(lora_b, (n, r), "lora_b")
    check_float(lora_a, "lora_a")
    check_float(lora_b, "lora_b")
    if base.absmax is None:
        check_float(base.weight, "weight")
        check_shape(base.weight, (n, k), "weight")
        weight = Nf4(Pointers(base.weight.contiguous()), base.layout)
    else:
        weight = nf4(base, n, k)
    a, b = lora_a.float().contiguous(), lora_b.float().contiguous()
    if weight.pointers.absmax is None or weight.is_fused:
        return _norms(weight, a, b, scaling)
    norms = a.new_empty(n)
    for rows in pieces(n, k, a.element_size()):
        piece, part = a.new_empty(len(rows), k), slice(rows.start, rows.stop)
        dequantize_part(weight, k, rows, range(k), piece)
        norms[part] = _norms(Nf4(Pointers(piece), 0), a, b[part], scaling)
    return norms


def _norms(weight: Nf4, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    squares = _squares(weight, a, b, scaling)
    delta = ((b @ (a @ a.t())) * b).sum(1)
    return (squares.sum(0) + scaling**2 * delta).clamp_min_(0).sqrt_()


def _squares(weight: Nf4, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Partial sums of ||W||^2 + 2 s (W A^T) . B per row: fp32 [.., n]."""
    (r, k), n = a.shape, b.shape[0]
    run = run_length(weight, k, torch.float16) if k and weight.pointers.absmax is not None else None
    # Reading single elements needs so many registers that only few ranks fit.
    block_r = min(max(power_of_2(max(r, 1)), 16), FEW_RANKS if run is None else MANY_RANKS)
    if run is None:
        tiles, unit = ELEMENTS, ELEMENTS["BLOCK_K"]
    else:
        tiles, unit = RUNS if block_r <= FEW_RANKS else RUNS_BY_MANY_RANKS, run
    parts = max(cdiv(r, block_r), 1)
    programs = parts * cdiv(n, tiles["BLOCK_N"])
    split = split_k(programs, k, unit, a.device)
    squares = a.new_empty((split.splits * parts, n))
    grid, rest = (programs, split.splits), (b, squares, n, k, r, scaling, split.units)
    constants = {"LAYOUT": weight.layout, "BLOCK_R": block_r}
    if run is None:
        launch(norm_kernel, grid, weight.pointers, a, *rest, config=tiles, **constants)
    else:
        halves, units = a.new_empty((2, r, k), dtype=torch.float16), a.new_empty(r)
        launch(halves_kernel, (r,), a, halves, units, r, k, config=HALVES)
        tensors = weight.pointers, halves, units
        launch(norm_of_runs_kernel, grid, *tensors, *rest, config=tiles, RUN=run, **constants)
    return squares
