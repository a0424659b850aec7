"""GEMMs of a mixture of experts: rows sorted by expert, each times its expert's weight or adapter.

`ends`, read on the device, holds where each expert's rows end. A program computes a slot: BLOCK_M rows of one
expert. The grid has as many slots as there can be; programs without rows return at once. Rows after the last
end belong to no expert, and their results are zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..core.gemm import add_dot, dot, reduce_splits, store_tile
from ..core.launch import VARYING
from ..core.lora_delta import DeltaArgs
from ..linear.linear_kernels import weight_tile
from ..nf4.nf4_weight import Pointers


class Strides(NamedTuple):
    """Strides between experts in the tensors of a weight and of its adapter."""

    packed: int = 0
    absmax: int = 0
    absmax2: int = 0  # 0 also where all experts share the values of scale codes
    bias: int = 0
    v: int = 0


class Factor(NamedTuple):
    """A matrix per expert."""

    pointer: Tensor
    expert_stride: int
    stride: int
    rank_stride: int


@triton.jit
def expert_rows(ends_ptr, rows, experts, expert):
    """Where the rows of `expert`, int32 of any shape, begin and end; clamped to the rows, whatever `ends`
    holds. Index `experts` has the rows of no expert."""
    stop = tl.load(ends_ptr + expert, mask=expert < experts, other=0)
    stop = tl.maximum(tl.minimum(tl.where(expert < experts, stop, rows), rows), 0)
    inside = (expert > 0) & (expert <= experts)
    begin = tl.load(ends_ptr + expert - 1, mask=inside, other=0)
    return tl.maximum(tl.minimum(tl.where(expert <= experts, begin, rows), rows), 0), stop


@triton.jit
def find_slot(ends_ptr, rows, experts, slot, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a slot, its first row in that slot, and where its rows end. A slot without rows begins
    where it ends. EXPERTS: a power of two above the number of experts."""
    each = tl.arange(0, EXPERTS)
    begin, stop = expert_rows(ends_ptr, rows, experts, each)
    slots = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    behind = tl.cumsum(slots, axis=0)
    before = behind - slots
    own = (before <= slot) & (slot < behind)
    first = tl.sum(tl.where(own, begin + (slot - before) * BLOCK_M, 0), axis=0)
    return tl.sum(tl.where(own, each, 0), axis=0), first, tl.sum(tl.where(own, stop, 0), axis=0)


@triton.jit(do_not_specialize=VARYING)
def experts_kernel(
    x_ptr,
    ends_ptr,
    weight,
    bias_ptr,
    delta,
    strides,
    out_ptr,
    parts,
    rows,
    experts,
    features,
    depth,
    split,
    LAYOUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    RUN: tl.constexpr,
    UNIT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[rows, features] = x[rows, depth] W + bias + delta, with W, bias and delta of each row's expert. A
    program sums over `split` times UNIT.

    W is the weight [depth, features] with BACKWARD, else the transpose of the weight [features, depth]. RUN
    as in `linear_tile`; 0 where elements are read one by one, and for a dense weight.
    """
    # Neighbouring programs read the same x: the L2 cache holds an expert's weight, but not all rows.
    tiles = tl.cdiv(features, BLOCK_F)
    slot = tl.program_id(0) // tiles
    expert, first_row, stop = find_slot(ends_ptr, rows, experts, slot, EXPERTS, BLOCK_M)
    if first_row >= stop:
        return
    token = first_row + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_F
    if expert == experts:
        if tl.program_id(1) == 0:
            nothing = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
            store_tile(out_ptr, nothing, token, stop, first + tl.arange(0, BLOCK_F), features, True)
        return
    expert = expert.to(tl.int64)
    # Inline, because functions cannot return None, which a pointer may be.
    absmax, absmax2, offset = weight.absmax, weight.absmax2, weight.offset
    if absmax is not None:
        absmax += expert * strides.absmax
    if absmax2 is not None:
        absmax2 += expert * strides.absmax2
    if offset is not None:
        offset += expert
    own = Pointers(weight.packed + expert * strides.packed, absmax, absmax2, offset, weight.dynamic_map)
    if bias_ptr is not None:
        bias_ptr += expert * strides.bias
    if delta is None:  # a variable cannot be None
        tensors = (x_ptr, own, bias_ptr, None, out_ptr, parts)
    else:
        u, v, u_stride, v_stride, v_rank_stride, rank, scale = delta
        own_delta = DeltaArgs(u, v + expert * strides.v, u_stride, v_stride, v_rank_stride, rank, scale)
        tensors = (x_ptr, own, bias_ptr, own_delta, out_ptr, parts)  # type: ignore[assignment]
    sizes = (token, stop, first, features, depth, split)
    mask = (None, 0, 0)
    weight_tile(tensors, sizes, mask, LAYOUT, BACKWARD, RUN, UNIT, BLOCK_M, BLOCK_F)


@triton.jit(do_not_specialize=VARYING)
def experts_shrink_kernel(
    x_ptr,
    ends_ptr,
    factor,
    out_ptr,
    parts,
    rows,
    experts,
    features,
    rank,
    scale,
    split,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[rows, rank] = scale x[rows, features] factor[features, rank] of each row's expert; fp32, 0 in rows
    of no expert. A program sums over `split` times BLOCK_F."""
    tiles = tl.cdiv(rank, BLOCK_R)
    slot = tl.program_id(0) // tiles
    expert, first_row, stop = find_slot(ends_ptr, rows, experts, slot, EXPERTS, BLOCK_M)
    if first_row >= stop:
        return
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    r = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    depth = split * BLOCK_F
    begin = tl.program_id(1) * depth
    end = tl.where(expert < experts, tl.minimum(begin + depth, features), begin)  # no expert: an empty sum
    values = factor.pointer + tl.minimum(expert, experts - 1).to(tl.int64) * factor.expert_stride
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_F):
        feature = start + tl.arange(0, BLOCK_F)
        inside = (row < stop)[:, None] & (feature < features)[None, :]
        tile = tl.load(x_ptr + row[:, None] * features + feature[None, :], mask=inside, other=0.0)
        at = feature.to(tl.int64)[:, None] * factor.stride + r.to(tl.int64)[None, :] * factor.rank_stride
        inside = (feature < features)[:, None] & (r < rank)[None, :]
        acc = add_dot(acc, dot(tile, tl.load(values + at, mask=inside, other=0.0), tl.float32))
    splits = tl.num_programs(1)
    total, last = reduce_splits(acc * scale, parts, tl.program_id(0) * splits, tl.program_id(1), splits)
    inside = (row < stop)[:, None] & (r < rank)[None, :] & last
    tl.store(out_ptr + row[:, None] * rank + r[None, :], total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def experts_over_rows_kernel(
    x_ptr,
    ends_ptr,
    factor_ptr,
    out,
    rows,
    experts,
    features,
    rank,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[features, rank] = scale x[rows, features]^T factor[rows, rank] per expert, over its rows."""
    feature_tiles = tl.cdiv(features, BLOCK_F)
    tile = tl.program_id(0) % (feature_tiles * tl.cdiv(rank, BLOCK_R))
    expert = tl.program_id(0) // (feature_tiles * tl.cdiv(rank, BLOCK_R))
    feature = tile % feature_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    r = tile // feature_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    begin, stop = expert_rows(ends_ptr, rows, experts, expert)
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for start in range(begin, stop, BLOCK_M):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        there = (row < stop)[:, None]
        at = x_ptr + row[:, None] * features + feature[None, :]
        tokens = tl.load(at, mask=there & (feature < features)[None, :], other=0.0)
        at = factor_ptr + row[:, None] * rank + r[None, :]
        ranks = tl.load(at, mask=there & (r < rank)[None, :], other=0.0)
        acc = add_dot(acc, dot(tl.trans(tokens), ranks, tl.float32))
    at = out.pointer + expert.to(tl.int64) * out.expert_stride + feature.to(tl.int64)[:, None] * out.stride
    at += r.to(tl.int64)[None, :] * out.rank_stride
    inside = (feature < features)[:, None] & (r < rank)[None, :]
    tl.store(at, (acc * scale).to(out.pointer.dtype.element_ty), mask=inside)
