"""The kernels of bottleneck adapters: each direction is one launch, from features to ranks and back.

A program computes a tile of rows. It stores the ranks to global memory and reads them back, since a thread
needs ranks that other threads of the program computed.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..core.dropout import keep_mask, unpack_mask
from ..core.gemm import store_tile, sync_stores
from ..core.launch import VARYING, varying
from ..core.lora_delta import Selection, SelectionArgs, delta_tile
from ..gated import activate
from ..lora.lora_gemms import shrink_sum


class ShrinkArgs(NamedTuple):
    """The GEMM into the bottleneck, for kernels: x[m, features] factor[features, rank]."""

    x: Tensor
    factor: Tensor
    features: int
    rank: int
    factor_stride: int
    factor_rank_stride: int
    selection: SelectionArgs


def shrink_args(x: Tensor, factor: Tensor) -> ShrinkArgs:
    (features, rank), (stride, rank_stride) = factor.shape, factor.stride()
    return ShrinkArgs(x, factor, features, rank, stride, rank_stride, Selection().args)


class OwnRows(NamedTuple):
    """The rows of one adapter among those of several, for kernels."""

    order: Tensor  # int32 [m]: rows sorted by adapter
    begins: Tensor  # int32 [adapters + 1]: where those of each begin in it, and where the last one's end
    adapter: int  # varying


def own_rows(order: Tensor, begins: Tensor, adapter: int) -> OwnRows:
    return OwnRows(order, begins, varying(adapter))


@triton.jit
def rows_of_program(own, m, BLOCK_M: tl.constexpr):
    """The rows of a program; their positions among the adapter's, which dropout counts by; and how many rows
    the adapter has. `own` is None or an `OwnRows`; without it, the adapter has all rows. A position after
    the last row stands for that row of x or, with several adapters, for the program's first row."""
    first = tl.program_id(0) * BLOCK_M
    position = first + tl.arange(0, BLOCK_M)
    if own is None:
        token = position
        count = m
    else:
        begins = own.begins + (own.adapter >> 4)
        begin = tl.load(begins)
        count = tl.load(begins + 1) - begin
        at = begin + tl.where(position < count, position, first)
        token = tl.load(own.order + at, mask=at < m, other=0)
    return token, position, count


@triton.jit
def dropout_factor(mask, scale, position, first, ranks, QUADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The dropout factor of ranks from `first` on. A factor, not a selection: a dropped NaN stays NaN."""
    factor = tl.full((position.shape[0], BLOCK_R), 1.0, tl.float32)
    if mask.seed is not None:
        factor = tl.where(keep_mask(unpack_mask(mask), position, first, ranks, BLOCK_R, QUADS), scale, 0.0)
    return factor


@triton.jit(do_not_specialize=VARYING)
def bottleneck_kernel(
    shrink,
    down_bias_ptr,
    z_ptr,
    mask,
    mask_scale,
    delta,
    up_bias_ptr,
    residual_ptr,
    y_ptr,
    own,
    m,
    features,
    ld,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """z[m, rank] = shrink + down_bias, u = drop(activation(z)), y[m, features] = residual + scale (u v^T +
    up_bias); u, v and scale are those of `delta`. Where 0 is added, y is bit-equal to the residual. Rows of z
    and u are `ld` elements apart. For the rows of `own`: see `rows_of_program`."""
    token, position, count = rows_of_program(own, m, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    row, there = token.to(tl.int64), position < count
    for first in range(0, shrink.rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        z = shrink_sum(shrink, row, there, r, 0, shrink.features, False, BLOCK_K)
        if down_bias_ptr is not None:
            z += tl.load(down_bias_ptr + r, mask=r < shrink.rank, other=0.0).to(tl.float32)[None, :]
        at = row[:, None] * ld + r[None, :]
        inside = there[:, None] & (r < shrink.rank)[None, :]
        tl.store(z_ptr + at, z, mask=inside)
        value, _ = activate(z, ACTIVATION, True)
        value *= dropout_factor(mask, mask_scale, position.to(tl.int64), first, shrink.rank, QUADS, BLOCK_R)
        tl.store(delta.u + at, value, mask=inside)
    sync_stores(delta.u.to(tl.pointer_type(tl.int32)))
    for first in range(0, features, BLOCK_F):
        feature = first + tl.arange(0, BLOCK_F)
        added = delta_tile(delta, token, m, feature, features, DTYPE, SUM_R)
        if up_bias_ptr is not None:
            bias = tl.load(up_bias_ptr + feature, mask=feature < features, other=0.0)
            added += bias.to(tl.float32)[:, None]
        added *= delta.scale
        at = row[None, :] * features + feature[:, None]
        inside = (feature < features)[:, None] & there[None, :]
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(added == 0.0, residual, residual + added)
        store_tile(y_ptr, y, token, m, feature, features, there[None, :])


@triton.jit(do_not_specialize=VARYING)
def bottleneck_backward_kernel(
    shrink,
    z_ptr,
    value_ptr,
    dz_ptr,
    mask,
    mask_scale,
    scaling,
    delta,
    dy_ptr,
    dx_ptr,
    own,
    m,
    features,
    ld,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """value[m, rank] = drop(activation(z)), dz[m, rank] = drop(scaling shrink) activation'(z), dx[m,
    features] = dy + dz v^T; u of `delta` is dz. Outputs that are None are not computed; dy None counts as
    0. Rows as in `bottleneck_kernel`."""
    token, position, count = rows_of_program(own, m, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    row, there = token.to(tl.int64), position < count
    for first in range(0, shrink.rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        at = row[:, None] * ld + r[None, :]
        inside = there[:, None] & (r < shrink.rank)[None, :]
        value, derivative = activate(tl.load(z_ptr + at, mask=inside, other=0.0), ACTIVATION, True)
        factor = dropout_factor(mask, mask_scale, position.to(tl.int64), first, shrink.rank, QUADS, BLOCK_R)
        if value_ptr is not None:
            tl.store(value_ptr + at, value * factor, mask=inside)
        if dz_ptr is not None:
            d = shrink_sum(shrink, row, there, r, 0, shrink.features, False, BLOCK_K)
            tl.store(dz_ptr + at, d * scaling * factor * derivative, mask=inside)
    if dx_ptr is not None:
        sync_stores(dz_ptr.to(tl.pointer_type(tl.int32)))
        for first in range(0, features, BLOCK_F):
            feature = first + tl.arange(0, BLOCK_F)
            dx = delta_tile(delta, token, m, feature, features, DTYPE, SUM_R)
            if dy_ptr is not None:
                at = row[None, :] * features + feature[:, None]
                inside = (feature < features)[:, None] & there[None, :]
                dx += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            store_tile(dx_ptr, dx, token, m, feature, features, there[None, :])
