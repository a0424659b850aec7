"""Products with an NF4 weight on tensor cores, y = x W^T and dx = dY W, each with the delta of an adapter.

Features are the rows of a tile and tokens its columns: a tensor core takes at least 16 rows, but 8 columns.
Sums that are cut into splits leave fp32 parts, which `sum_parts` adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode, stretch
from .linear_tiles import delta_tile, dot, kept, load_elements, load_run_absmax, store_tile


@triton.jit
def linear_kernel(
    x,
    packed,
    absmax,
    absmax2,
    offset,
    dynamic_map,
    bias,
    u,
    v,
    out,
    m,
    n,
    k,
    split_k,
    rank,
    u_stride,
    scale,
    BLOCK_SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[m, n] = x[m, k] W^T + bias + scale u[m, rank] v[n, rank]^T. A program sums over split_k of k.

    ALIGNED: k is a multiple of GROUPS BLOCK_K, and BLOCK_K divides the
    blocksize, 2^BLOCK_SHIFT. Codes are multiplied as they are, and
    each run of BLOCK_K by its absmax afterwards.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    m_tiles = tl.cdiv(m, BLOCK_M)
    # Neighbours read the same weights.
    token = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies outside is read elsewhere, and not written.
    x_rows = tl.minimum(token, m - 1).to(tl.int64) * k
    w_rows = tl.minimum(feature, n - 1).to(tl.int64) * k
    first = tl.program_id(1) * split_k
    last = tl.minimum(first + split_k, k)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if ALIGNED:
        # Sums may run in any order. With this one a thread's operands are neighbours: byte j of a run stands
        # at 4 (j % QUARTER) + j // QUARTER.
        QUARTER: tl.constexpr = BLOCK_K // 8
        at = tl.arange(0, BLOCK_K)
        column = at // 2 % 4 * (2 * QUARTER) + at // 8 * 2 + at % 2
        x_tile = x + x_rows[:, None] + (first + column)[None, :]
        w_tile = packed + (w_rows >> 1)[:, None] + (first // 2 + tl.arange(0, BLOCK_K // 2))[None, :]
        for start in range(first, last, GROUPS * BLOCK_K):
            for group in tl.static_range(GROUPS):
                packed_tile = tl.reshape(tl.load(w_tile + group * (BLOCK_K // 2)), (BLOCK_N, 4, QUARTER))
                packed_tile = tl.reshape(tl.permute(packed_tile, (0, 2, 1)), (BLOCK_N, BLOCK_K // 2))
                tokens = tl.trans(tl.load(x_tile + group * BLOCK_K))
                zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = dot(decode(packed_tile, dtype, PTX), tokens, zero)
                element = w_rows + (start + group * BLOCK_K)
                scales = load_run_absmax(absmax, absmax2, offset, dynamic_map, element, BLOCK_SHIFT)
                acc += part * scales[:, None]
            x_tile += GROUPS * BLOCK_K
            w_tile += GROUPS * BLOCK_K // 2
        acc *= 1.0 / stretch(dtype)
    else:
        for start in range(first, last, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            inside = (column < k)[None, :]
            weights = load_elements(
                packed,
                absmax,
                absmax2,
                offset,
                dynamic_map,
                w_rows[:, None] + column[None, :],
                tl.broadcast_to(inside, (BLOCK_N, BLOCK_K)),
                BLOCK_SHIFT,
            )
            tokens = tl.load(x + x_rows[:, None] + column[None, :], mask=inside, other=0.0)
            acc = dot(weights.to(dtype), tl.trans(tokens), acc)

    if tl.program_id(1) == 0:
        if u is not None:
            acc += scale * delta_tile(u, u_stride, token, m, v, rank, 1, feature, n, rank, dtype, BLOCK_R)
        if bias is not None:
            acc += tl.load(bias + feature, mask=feature < n, other=0.0).to(tl.float32)[:, None]
    store_tile(out, acc, token, m, feature, n, SPLIT)


@triton.jit
def linear_dx_kernel(
    dy,
    packed,
    absmax,
    absmax2,
    offset,
    dynamic_map,
    u,
    v,
    out,
    m,
    n,
    k,
    split_n,
    rank,
    u_stride,
    scale,
    seed,
    stream,
    threshold: tl.uint32,
    BLOCK_SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[m, k] = dy[m, n] W + scale mask(u[m, rank] v[rank, k]). A program sums over split_n of n.

    ALIGNED: k is a multiple of RUN, and that divides the blocksize, 2^BLOCK_SHIFT.
    """
    dtype: tl.constexpr = dy.dtype.element_ty
    m_tiles = tl.cdiv(m, BLOCK_M)
    token = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_feature = tl.program_id(0) // m_tiles * BLOCK_K
    feature = first_feature + tl.arange(0, BLOCK_K)
    dy_rows = tl.minimum(token, m - 1).to(tl.int64) * n
    first = tl.program_id(1) * split_n
    last = tl.minimum(first + split_n, n)
    RUNS: tl.constexpr = BLOCK_K // RUN
    run = first_feature + RUN * tl.arange(0, RUNS)
    half = first_feature // 2 + tl.arange(0, BLOCK_K // 2)

    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        gradients = tl.load(dy + dy_rows[:, None] + row[None, :], mask=(row < n)[None, :], other=0.0)
        w_rows = tl.minimum(row, n - 1).to(tl.int64) * k
        if ALIGNED:
            byte = (w_rows >> 1)[:, None] + tl.minimum(half, k // 2 - 1)[None, :]
            numbers = decode(tl.load(packed + byte), dtype, PTX).to(tl.float32)
            element = w_rows[:, None] + tl.minimum(run, k - 1)[None, :]
            scales = load_run_absmax(absmax, absmax2, offset, dynamic_map, element, BLOCK_SHIFT)
            scales *= 1.0 / stretch(dtype)
            weights = tl.reshape(numbers, (BLOCK_N, RUNS, RUN)) * scales[:, :, None]
            weights = tl.reshape(weights, (BLOCK_N, BLOCK_K))
        else:
            element = w_rows[:, None] + feature[None, :]
            inside = tl.broadcast_to((feature < k)[None, :], (BLOCK_N, BLOCK_K))
            weights = load_elements(
                packed, absmax, absmax2, offset, dynamic_map, element, inside, BLOCK_SHIFT
            )
        acc = dot(tl.trans(weights.to(dtype)), tl.trans(gradients), acc)

    if u is not None:
        rows = token.to(tl.int64)
        if tl.program_id(1) == 0:
            delta = delta_tile(u, u_stride, token, m, v, 1, k, feature, k, rank, dtype, BLOCK_R)
            if seed is not None:
                keep = kept(seed, stream, threshold, rows, first_feature, k, BLOCK_K, QUADS)
                delta = tl.where(tl.trans(keep), delta, 0.0)
            acc += scale * delta
    store_tile(out, acc, token, m, feature, k, SPLIT)
