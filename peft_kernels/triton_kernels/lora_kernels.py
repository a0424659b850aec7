"""The products of LoRA adapters: activations to ranks, ranks to features, and sums over rows.

Adapters may be in fp32 beside 16-bit activations, and are not rounded then. With `row_group` the rows of
other groups count as zeros, whatever they hold. Sums that are cut into splits leave fp32 parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_tiles import delta_tile, dot_exact, kept, store_tile


@triton.jit
def is_served(row_group, group, row, m):
    """Which of `row`, int64, are rows of an adapter."""
    there = row < m
    if row_group is not None:
        there &= tl.load(row_group + row, mask=there, other=0) == group
    return there


@triton.jit
def load_seen(
    x,
    row,
    there,
    first,
    features,
    seed,
    stream,
    threshold,
    QUADS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """x[m, features] as an adapter sees it: elements that dropout drops, and those of rows that are not
    `there`, are 0. Features from `first` on."""
    feature = first + tl.arange(0, BLOCK_F)
    inside = there[:, None] & (feature < features)[None, :]
    tile = tl.load(x + row[:, None] * features + feature[None, :], mask=inside, other=0.0)
    if seed is not None:
        keep = kept(seed, stream, threshold, row, first, features, BLOCK_F, QUADS)
        tile = tl.where(keep, tile, 0.0)
    return tile


@triton.jit
def to_ranks_kernel(
    x,
    v,
    out,
    m,
    features,
    rank,
    split,
    v_stride,
    v_rank_stride,
    out_stride,
    scale,
    row_group,
    group,
    seed,
    stream,
    threshold: tl.uint32,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[m, rank] = scale mask(x)[m, features] v[features, rank], 0 in rows that are not served. A program
    sums over `split` features."""
    row_tiles = tl.cdiv(m, BLOCK_M)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(0) // row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    there = is_served(row_group, group, row, m)
    first = tl.program_id(1) * split
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + split, features), BLOCK_F):
        tile = load_seen(x, row, there, start, features, seed, stream, threshold, QUADS, BLOCK_F)
        feature = start + tl.arange(0, BLOCK_F)
        at = feature.to(tl.int64)[:, None] * v_stride + r.to(tl.int64)[None, :] * v_rank_stride
        inside = (feature < features)[:, None] & (r < rank)[None, :]
        acc += dot_exact(tile, tl.load(v + at, mask=inside, other=0.0), PTX)
    # Where v has Inf or NaN, zeros times it are not zeros.
    acc = tl.where(there[:, None], acc * scale, 0.0)
    at = out + row[:, None] * out_stride + r[None, :]
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * m * rank
    tl.store(at, acc, mask=(row < m)[:, None] & (r < rank)[None, :])


@triton.jit
def from_ranks_kernel(
    total,
    term,
    u,
    v,
    out,
    m,
    features,
    rank,
    u_stride,
    v_stride,
    v_rank_stride,
    scale,
    row_group,
    group,
    seed,
    stream,
    threshold: tl.uint32,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = total + term + scale mask(u[m, rank] v[features, rank]^T), the product in rows that
    are served alone. Each may be None; `out` may be one of the first two. DTYPE: of the activations."""
    row_tiles = tl.cdiv(m, BLOCK_M)
    token = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)
    first = tl.program_id(0) // row_tiles * BLOCK_F
    feature = first + tl.arange(0, BLOCK_F)
    at = row[None, :] * features + feature[:, None]
    inside = (feature < features)[:, None] & (row < m)[None, :]
    sum = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    if total is not None:
        sum += tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
    if term is not None:
        sum += tl.load(term + at, mask=inside, other=0.0).to(tl.float32)
    if u is not None:
        delta = scale * delta_tile(
            u, u_stride, token, m, v, v_stride, v_rank_stride, feature, features, rank, DTYPE, BLOCK_R
        )
        there = is_served(row_group, group, row, m)[None, :]
        if seed is not None:
            there &= tl.trans(kept(seed, stream, threshold, row, first, features, BLOCK_F, QUADS))
        sum += tl.where(there, delta, 0.0)
    store_tile(out, sum, token, m, feature, features, SPLIT=False)


@triton.jit
def over_rows_kernel(
    x,
    u,
    out,
    m,
    features,
    rank,
    split,
    u_stride,
    out_stride,
    out_rank_stride,
    scale,
    row_group,
    group,
    seed,
    stream,
    threshold: tl.uint32,
    SPLIT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[features, rank] = scale mask(x)[m, features]^T u[m, rank], over rows that are served. A program
    sums over `split` rows."""
    feature_tiles = tl.cdiv(features, BLOCK_F)
    first_feature = tl.program_id(0) % feature_tiles * BLOCK_F
    r = tl.program_id(0) // feature_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * split
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + split, m), BLOCK_M):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        there = is_served(row_group, group, row, m)
        tile = load_seen(x, row, there, first_feature, features, seed, stream, threshold, QUADS, BLOCK_F)
        inside = there[:, None] & (r < rank)[None, :]
        ranks = tl.load(u + row[:, None] * u_stride + r[None, :], mask=inside, other=0.0)
        acc += dot_exact(tl.trans(tile), ranks, PTX)
    feature = first_feature + tl.arange(0, BLOCK_F)
    at = out + feature.to(tl.int64)[:, None] * out_stride + r.to(tl.int64)[None, :] * out_rank_stride
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * features * rank
    inside = (feature < features)[:, None] & (r < rank)[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), mask=inside)
