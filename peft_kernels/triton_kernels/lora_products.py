"""The products of LoRA adapters: shrink (activations to ranks), expand (ranks to features), sums over rows.

Adapters may be in fp32 beside 16-bit activations, and are not rounded then. With `row_group` the rows of
other groups count as zeros, whatever they hold. Activations are rows, contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import kept
from .launch import VARYING, cdiv, config, launch, power_of_2
from .lora_adapters import Delta, Seen, delta_args, delta_tile
from .products import dot, split_sum, store_tile

MAX_RANKS = 64  # of a program

# Few rows make small tiles, of which nothing is wasted.
FEW_ROWS = 16
SHRINK_FEW = config(4, 3, BLOCK_M=16)
SHRINK = config(4, 3, BLOCK_M=64)
EXPAND_FEW = config(4, 2, BLOCK_M=16, BLOCK_F=128)
EXPAND = config(8, 2, BLOCK_M=64, BLOCK_F=128)
OVER_ROWS = config(4, 3, BLOCK_F=64)


@triton.jit
def is_served(row_group_ptr, group, row, m):
    """Which of `row`, int64, are rows of an adapter."""
    there = row < m
    if row_group_ptr is not None:
        there &= tl.load(row_group_ptr + row, mask=there, other=0) == group
    return there


@triton.jit
def load_seen(x_ptr, row, there, first, features, mask, QUADS: tl.constexpr, BLOCK_F: tl.constexpr):
    """x[m, features] as an adapter sees it: elements that dropout drops, and those of rows that are not
    `there`, are 0. Features from `first` on."""
    feature = first + tl.arange(0, BLOCK_F)
    inside = there[:, None] & (feature < features)[None, :]
    tile = tl.load(x_ptr + row[:, None] * features + feature[None, :], mask=inside, other=0.0)
    if mask[0] is not None:
        tile = tl.where(kept(mask, row, first, features, BLOCK_F, QUADS), tile, 0.0)
    return tile


@triton.jit(do_not_specialize=VARYING)
def shrink_kernel(
    x_ptr,
    v_ptr,
    out_ptr,
    m,
    features,
    rank,
    split,
    v_stride,
    v_rank_stride,
    out_stride,
    scale,
    row_group_ptr,
    group,
    seed_ptr,
    stream,
    threshold: tl.uint32,
    QUADS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[m, rank] = scale mask(x)[m, features] v[features, rank], 0 in rows that are not served. A program
    sums over `split` times BLOCK_F."""
    mask = (seed_ptr, stream, threshold)
    row_tiles = tl.cdiv(m, BLOCK_M)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(0) // row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    there = is_served(row_group_ptr, group, row, m)
    first = tl.program_id(1) * split * BLOCK_F
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + split * BLOCK_F, features), BLOCK_F):
        tile = load_seen(x_ptr, row, there, start, features, mask, QUADS, BLOCK_F)
        feature = start + tl.arange(0, BLOCK_F)
        at = feature.to(tl.int64)[:, None] * v_stride + r.to(tl.int64)[None, :] * v_rank_stride
        inside = (feature < features)[:, None] & (r < rank)[None, :]
        acc += dot(tile, tl.load(v_ptr + at, mask=inside, other=0.0), tl.float32)
    # Where v has Inf or NaN, zeros times it are not zeros.
    acc = tl.where(there[:, None], acc * scale, 0.0)
    at = out_ptr + row[:, None] * out_stride + r[None, :]
    at += tl.program_id(1).to(tl.int64) * m * rank
    tl.store(at, acc, mask=(row < m)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=VARYING)
def expand_kernel(
    total_ptr,
    term_ptr,
    delta,
    out_ptr,
    m,
    features,
    row_group_ptr,
    group,
    seed_ptr,
    stream,
    threshold: tl.uint32,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = total + term + mask(delta), that in rows that are served alone. Each may be None;
    `out` may be one of the first two. DTYPE: of the activations."""
    row_tiles = tl.cdiv(m, BLOCK_M)
    token = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)
    first = tl.program_id(0) // row_tiles * BLOCK_F
    feature = first + tl.arange(0, BLOCK_F)
    at = row[None, :] * features + feature[:, None]
    inside = (feature < features)[:, None] & (token < m)[None, :]
    added = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    if delta is not None:  # first, for its products take registers
        added = delta.scale * delta_tile(delta, token, m, feature, features, DTYPE, BLOCK_R)
        there = is_served(row_group_ptr, group, row, m)[None, :]
        if seed_ptr is not None:
            mask = (seed_ptr, stream, threshold)
            there &= tl.trans(kept(mask, row, first, features, BLOCK_F, QUADS))
        added = tl.where(there, added, 0.0)
    sum = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    if total_ptr is not None:
        sum += tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if term_ptr is not None:
        sum += tl.load(term_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sum += added
    store_tile(out_ptr, sum, token, m, feature, features)


@triton.jit(do_not_specialize=VARYING)
def over_rows_kernel(
    x_ptr,
    u_ptr,
    out_ptr,
    m,
    features,
    rank,
    split,
    u_stride,
    out_stride,
    out_rank_stride,
    scale,
    row_group_ptr,
    group,
    seed_ptr,
    stream,
    threshold: tl.uint32,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[features, rank] = scale mask(x)[m, features]^T u[m, rank], over rows that are served. A program
    sums over `split` times BLOCK_M."""
    mask = (seed_ptr, stream, threshold)
    feature_tiles = tl.cdiv(features, BLOCK_F)
    first_feature = tl.program_id(0) % feature_tiles * BLOCK_F
    r = tl.program_id(0) // feature_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * split * BLOCK_M
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + split * BLOCK_M, m), BLOCK_M):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        there = is_served(row_group_ptr, group, row, m)
        tile = load_seen(x_ptr, row, there, first_feature, features, mask, QUADS, BLOCK_F)
        inside = there[:, None] & (r < rank)[None, :]
        ranks = tl.load(u_ptr + row[:, None] * u_stride + r[None, :], mask=inside, other=0.0)
        acc += dot(tl.trans(tile), ranks, tl.float32)
    feature = first_feature + tl.arange(0, BLOCK_F)
    at = out_ptr + feature.to(tl.int64)[:, None] * out_stride + r.to(tl.int64)[None, :] * out_rank_stride
    at += tl.program_id(1).to(tl.int64) * features * rank
    inside = (feature < features)[:, None] & (r < rank)[None, :]
    tl.store(at, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


def shrink(x: Tensor, v: Tensor, out: Tensor, scale: float, seen: Seen) -> None:
    """out = scale mask(x) v, fp32 [m, rank], with x [m, features] and v [features, rank]; 0 in rows that are
    not served."""
    if out.numel() == 0:
        return
    (m, features), rank = x.shape, v.shape[1]
    tiles = SHRINK_FEW if m <= FEW_ROWS else SHRINK
    block_f, block_r = _depth(x), _ranks(rank)
    programs = cdiv(m, tiles["BLOCK_M"]) * cdiv(rank, block_r)
    split = split_sum(programs, features, block_f, out)
    tensors, sizes = (x, v, split.target), (m, features, rank, split.units)
    strides = *v.stride(), split.target.stride(-2)
    args = *tensors, *sizes, *strides, scale * seen.scale, *seen.args
    blocks = {"QUADS": features % 4 == 0, "BLOCK_F": block_f, "BLOCK_R": block_r}
    launch(shrink_kernel, (programs, split.count), *args, config=tiles, **blocks)
    split.finish()


def sum_with_deltas(terms: Sequence[Tensor], deltas: Sequence[Delta]) -> Tensor:
    """The sum of `terms` [m, features], at least one, and `deltas`: in fp32, rounded once. In the memory of
    the first term."""
    first = terms[0]
    if len(terms) == 1 and not deltas:
        return first
    steps = list(zip_longest(terms, deltas))
    total = None
    for term, delta in steps[:-1]:
        out = torch.empty_like(first, dtype=torch.float32) if total is None else total
        _expand(total, term, delta, out, first.dtype)
        total = out
    _expand(total, *steps[-1], first, first.dtype)
    return first


def _expand(
    total: Tensor | None, term: Tensor | None, delta: Delta | None, out: Tensor, dtype: torch.dtype
) -> None:
    """out = total + term + delta, of activations of `dtype`."""
    m, features = out.shape
    tiles = EXPAND_FEW if m <= FEW_ROWS else EXPAND
    seen = Seen() if delta is None else delta.seen
    grid = (cdiv(m, tiles["BLOCK_M"]) * cdiv(features, tiles["BLOCK_F"]), 1)
    args = total, term, delta_args(delta), out, m, features, *seen.args
    block_r = _ranks(0 if delta is None else delta.v.shape[1])
    constants = {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "QUADS": features % 4 == 0}
    launch(expand_kernel, grid, *args, config=tiles, BLOCK_R=block_r, **constants)


def over_rows(x: Tensor, u: Tensor, out: Tensor, scale: float, seen: Seen) -> None:
    """out = scale mask(x)^T u, [features, rank], contiguous or the transpose of such, over rows that are
    served; with x [m, features] and u [m, rank] in fp32."""
    if out.numel() == 0:
        return
    (m, features), rank = x.shape, u.shape[1]
    block_m, block_r = _depth(x), _ranks(rank)
    programs = cdiv(features, OVER_ROWS["BLOCK_F"]) * cdiv(rank, block_r)
    split = split_sum(programs, m, block_m, out if out.is_contiguous() else out.t())
    tensors, sizes = (x, u, split.target), (m, features, rank, split.units)
    args = *tensors, *sizes, u.stride(0), *out.stride(), scale * seen.scale, *seen.args
    blocks = {"QUADS": features % 4 == 0, "BLOCK_M": block_m, "BLOCK_R": block_r}
    launch(over_rows_kernel, (programs, split.count), *args, config=OVER_ROWS, **blocks)
    split.finish()


def _depth(x: Tensor) -> int:
    """How many terms of a sum a program takes at a time."""
    return 32 if x.dtype == torch.float32 else 64


def _ranks(rank: int) -> int:
    return min(max(power_of_2(rank), 16), MAX_RANKS)
