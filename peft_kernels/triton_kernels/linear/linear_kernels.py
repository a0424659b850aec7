"""GEMMs with a packed weight on tensor cores, y = x W^T and dx = dY W, each with the delta of an adapter.

`linear_tile`, `linear_short_tile` and `linear_dx_tile` take weights whose rows are made of runs: elements
that share an absmax and fill whole bytes. `unaligned_tile` reads elements one by one, for all other weights
and for dense ones. Their `tensors` are (x, weight, bias, delta, out, parts), their `sizes` (token, m,
first_feature, features, depth, split). Features are the rows of a tile and tokens its columns: a tensor core
takes at least 16 rows, but only 8 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.dropout import keep_mask
from ..core.gemm import add_dot, dot, reduce_splits, store_tile, uses_wgmma
from ..core.launch import VARYING
from ..core.lora_delta import delta_tile
from ..nf4.nf4_decode import (
    absmax_of,
    block_shift,
    decode,
    decode_scale,
    load_absmax,
    load_elements,
    load_packed_absmax,
)
from ..nf4.nf4_weight import SHORT_RUN

RANKS = tl.constexpr(16)  # ranks of an adapter per step
SHORT = tl.constexpr(SHORT_RUN)  # too short for a product of its own
BLOCK_D = tl.constexpr(32)  # of an unaligned weight: registers hold no more single elements


@triton.jit
def load_run_absmax(weight, element, LAYOUT: tl.constexpr):
    """The absmax of the blocks of `element`, int64 of any shape."""
    return load_absmax(weight, element >> block_shift(LAYOUT), tl.full(element.shape, True, tl.int1))


@triton.jit
def load_run_packed_absmax(weight, element, there, LAYOUT: tl.constexpr):
    """The stored form of it, for `absmax_of`. `there`: whether the weight has elements."""
    there = tl.full(element.shape, True, tl.int1) & there
    return load_packed_absmax(weight, element >> block_shift(LAYOUT), there)


@triton.jit
def finish_tile(acc, tensors, sizes, mask, dtype: tl.constexpr, BLOCK_F: tl.constexpr, QUADS: tl.constexpr):
    """Store the sum of the splits [features, tokens], for activations of `dtype`. The first split adds
    mask(delta) and bias. `mask` and QUADS as in `keep_mask`."""
    _x, _weight, bias_ptr, delta, out_ptr, parts = tensors
    token, m, first, features, _depth, _split = sizes
    feature = first + tl.arange(0, BLOCK_F)
    if tl.program_id(1) == 0:
        if delta is not None:
            added = delta_tile(delta, token, m, feature, features, dtype, RANKS)
            if mask[0] is not None:
                keep = keep_mask(mask, token.to(tl.int64), first, features, BLOCK_F, QUADS)
                added = tl.where(tl.trans(keep), added, 0.0)
            acc += delta.scale * added
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)[:, None]
    splits = tl.num_programs(1)
    total, last = reduce_splits(acc, parts, tl.program_id(0) * splits, tl.program_id(1), splits)
    store_tile(out_ptr, total, token, m, feature, features, last)


@triton.jit
def linear_tile(
    tensors,
    sizes,
    mask,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = x[m, depth] W[features, depth]^T + bias + delta, for the consecutive rows `token`
    below m. A program sums over `split` times GROUPS RUN; depth is a multiple of GROUPS RUN.

    RUN divides the blocksize. Decoded codes are multiplied unscaled; the sum of each run is multiplied by its
    absmax. `mask` as in `keep_mask`.
    """
    x_ptr, weight, _bias, _delta, _out, _parts = tensors
    token, m, first_feature, features, depth, split = sizes
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Indices outside are clamped, and their results not stored.
    x_rows = tl.minimum(token, m - 1).to(tl.int64) * depth
    feature = first_feature + tl.arange(0, BLOCK_F)
    w_rows = tl.minimum(feature, features - 1).to(tl.int64) * depth
    STEP: tl.constexpr = GROUPS * RUN
    first = tl.program_id(1) * split * STEP

    # The order of summation is free. For wgmma, byte j of a run moves to 4 (j % QUARTER) + j // QUARTER, so
    # that a thread's operands are neighbours. Otherwise the compiler finds such an order itself, and x can be
    # copied in longer vectors. With eight tokens programs have more warps than wgmma has rows for.
    PERMUTED: tl.constexpr = uses_wgmma() and BLOCK_M > 8
    QUARTER: tl.constexpr = RUN // 8
    column = tl.arange(0, RUN)
    if PERMUTED:
        column = column // 2 % 4 * (2 * QUARTER) + column // 8 * 2 + column % 2
    x_tile = x_ptr + x_rows[:, None] + (first + column)[None, :]
    w_tile = weight.packed + (w_rows >> 1)[:, None] + (first // 2 + tl.arange(0, RUN // 2))[None, :]
    acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    # Loaded a run ahead: the stored absmax is an index into a table, so there are two loads to wait for.
    stored = load_run_packed_absmax(weight, w_rows + first, depth > 0, LAYOUT)
    for start in range(first, tl.minimum(first + split * STEP, depth), STEP):
        for group in tl.static_range(GROUPS):
            scales = absmax_of(weight, stored[0], stored[1])
            ahead = tl.minimum(start + (group + 1) * RUN, depth - RUN)
            stored = load_run_packed_absmax(weight, w_rows + ahead, True, LAYOUT)
            packed = tl.load(w_tile + group * (RUN // 2))
            if PERMUTED:
                packed = tl.permute(tl.reshape(packed, (BLOCK_F, 4, QUARTER)), (0, 2, 1))
                packed = tl.reshape(packed, (BLOCK_F, RUN // 2))
            tokens = tl.trans(tl.load(x_tile + group * RUN))
            part = dot(decode(packed, dtype, LAYOUT), tokens, dtype)
            acc += part * scales[:, None]
        x_tile += STEP
        w_tile += STEP // 2
    acc *= 1.0 / decode_scale(dtype, LAYOUT)
    finish_tile(acc, tensors, sizes, mask, dtype, BLOCK_F, True)


@triton.jit
def linear_short_tile(
    tensors,
    sizes,
    mask,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`linear_tile` for short runs: weights are scaled before they are multiplied, as in `linear_dx_tile`, so
    that a product sums over several runs.

    A program sums over `split` times BLOCK_D. depth is a multiple of RUN, which divides the blocksize.
    """
    x_ptr, weight, _bias, _delta, _out, _parts = tensors
    token, m, first_feature, features, depth, split = sizes
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Indices outside are clamped, and their results not stored.
    x_rows = tl.minimum(token, m - 1).to(tl.int64) * depth
    feature = first_feature + tl.arange(0, BLOCK_F)
    w_rows = tl.minimum(feature, features - 1).to(tl.int64) * depth
    first = tl.program_id(1) * split * BLOCK_D
    RUNS: tl.constexpr = BLOCK_D // RUN
    acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for start in range(first, tl.minimum(first + split * BLOCK_D, depth), BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        tokens = tl.load(x_ptr + x_rows[:, None] + column[None, :], mask=(column < depth)[None, :], other=0.0)
        half = tl.minimum(start // 2 + tl.arange(0, BLOCK_D // 2), depth // 2 - 1)
        packed = tl.load(weight.packed + (w_rows >> 1)[:, None] + half[None, :])
        run = tl.minimum(start + RUN * tl.arange(0, RUNS), depth - 1)
        scales = load_run_absmax(weight, w_rows[:, None] + run[None, :], LAYOUT)
        scales *= 1.0 / decode_scale(dtype, LAYOUT)
        values = tl.reshape(decode(packed, dtype, LAYOUT).to(tl.float32), (BLOCK_F, RUNS, RUN))
        weights = tl.reshape(values * scales[:, :, None], (BLOCK_F, BLOCK_D)).to(dtype)
        if dtype == tl.float32:
            acc = add_dot(acc, dot(weights, tl.trans(tokens), dtype))
        else:
            acc = dot(weights, tl.trans(tokens), dtype, acc)
    finish_tile(acc, tensors, sizes, mask, dtype, BLOCK_F, True)


@triton.jit
def linear_dx_tile(
    tensors,
    sizes,
    mask,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = dy[m, depth] W[depth, features] + bias + mask(delta), for the consecutive rows
    `token` below m. A program sums over `split` times BLOCK_D.

    features is a multiple of RUN, which divides the blocksize.
    """
    dy_ptr, weight, _bias, _delta, _out, _parts = tensors
    token, m, first_feature, features, depth, split = sizes
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    dy_rows = tl.minimum(token, m - 1).to(tl.int64) * depth
    first = tl.program_id(1) * split * BLOCK_D
    RUNS: tl.constexpr = BLOCK_F // RUN
    run = first_feature + RUN * tl.arange(0, RUNS)
    half = first_feature // 2 + tl.arange(0, BLOCK_F // 2)

    acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for start in range(first, tl.minimum(first + split * BLOCK_D, depth), BLOCK_D):
        row = start + tl.arange(0, BLOCK_D)
        gradients = tl.load(dy_ptr + dy_rows[:, None] + row[None, :], mask=(row < depth)[None, :], other=0.0)
        w_rows = tl.minimum(row, depth - 1).to(tl.int64) * features
        byte = (w_rows >> 1)[:, None] + tl.minimum(half, features // 2 - 1)[None, :]
        values = decode(tl.load(weight.packed + byte), dtype, LAYOUT).to(tl.float32)
        element = w_rows[:, None] + tl.minimum(run, features - 1)[None, :]
        scales = load_run_absmax(weight, element, LAYOUT) * (1.0 / decode_scale(dtype, LAYOUT))
        weights = tl.reshape(values, (BLOCK_D, RUNS, RUN)) * scales[:, :, None]
        weights = tl.reshape(weights, (BLOCK_D, BLOCK_F)).to(dtype)
        if dtype == tl.float32:
            acc = add_dot(acc, dot(tl.trans(weights), tl.trans(gradients), dtype))
        else:
            acc = dot(tl.trans(weights), tl.trans(gradients), dtype, acc)
    finish_tile(acc, tensors, sizes, mask, dtype, BLOCK_F, True)


@triton.jit
def load_any(weight, element, mask, LAYOUT: tl.constexpr):
    """`load_elements`, for dense weights too."""
    if weight.absmax is None:
        return tl.load(weight.packed + element, mask=mask, other=0.0)
    else:
        return load_elements(weight, element, mask, LAYOUT)


@triton.jit
def unaligned_tile(
    tensors,
    sizes,
    mask,
    LAYOUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = x[m, depth] W + bias + mask(delta), for the consecutive rows `token` below m. A
    program sums over `split` times BLOCK_D.

    W is the weight [depth, features] with BACKWARD, else the transpose of the weight [features, depth].
    """
    x_ptr, weight, _bias, _delta, _out, _parts = tensors
    token, m, first_feature, features, depth, split = sizes
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Indices outside are clamped, and their results not stored.
    feature = tl.minimum(first_feature + tl.arange(0, BLOCK_F), features - 1).to(tl.int64)
    x_rows = tl.minimum(token, m - 1).to(tl.int64) * depth
    first = tl.program_id(1) * split * BLOCK_D
    acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for start in range(first, tl.minimum(first + split * BLOCK_D, depth), BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        tokens = tl.load(x_ptr + x_rows[:, None] + at[None, :], mask=(at < depth)[None, :], other=0.0)
        if BACKWARD:
            element = at.to(tl.int64)[:, None] * features + feature[None, :]
            inside = tl.broadcast_to((at < depth)[:, None], (BLOCK_D, BLOCK_F))
            weights = tl.trans(load_any(weight, element, inside, LAYOUT).to(dtype))
        else:
            element = feature[:, None] * depth + at[None, :]
            inside = tl.broadcast_to((at < depth)[None, :], (BLOCK_F, BLOCK_D))
            weights = load_any(weight, element, inside, LAYOUT).to(dtype)
        if dtype == tl.float32:
            acc = add_dot(acc, dot(weights, tl.trans(tokens), dtype))
        else:
            acc = dot(weights, tl.trans(tokens), dtype, acc)
    finish_tile(acc, tensors, sizes, mask, dtype, BLOCK_F, False)


@triton.jit
def weight_tile(
    tensors,
    sizes,
    mask,
    LAYOUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    RUN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """x times the weight [depth, features] with BACKWARD, else times the transposed weight [features, depth],
    by the function for its layout. RUN 0: elements are read one by one, as those of a dense weight. A program
    sums over `split` times UNIT."""
    if RUN == 0:
        unaligned_tile(tensors, sizes, mask, LAYOUT, BACKWARD, BLOCK_M, BLOCK_F)
    elif BACKWARD:
        linear_dx_tile(tensors, sizes, mask, LAYOUT, RUN, UNIT, BLOCK_M, BLOCK_F)
    elif RUN == SHORT:
        linear_short_tile(tensors, sizes, mask, LAYOUT, RUN, UNIT, BLOCK_M, BLOCK_F)
    else:
        linear_tile(tensors, sizes, mask, LAYOUT, RUN, UNIT // RUN, BLOCK_M, BLOCK_F)


@triton.jit(do_not_specialize=VARYING)
def linear_kernel(
    x_ptr,
    weight,
    bias_ptr,
    delta,
    out_ptr,
    parts,
    m,
    features,
    depth,
    split,
    seed_ptr,
    stream,
    threshold: tl.uint32,
    LAYOUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    RUN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`weight_tile` for all rows."""
    m_tiles = tl.cdiv(m, BLOCK_M)
    # Neighbouring programs read the same weights.
    token = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // m_tiles * BLOCK_F
    mask = (seed_ptr, stream, threshold)
    tensors = (x_ptr, weight, bias_ptr, delta, out_ptr, parts)
    sizes = (token, m, first, features, depth, split)
    weight_tile(tensors, sizes, mask, LAYOUT, BACKWARD, RUN, UNIT, BLOCK_M, BLOCK_F)
