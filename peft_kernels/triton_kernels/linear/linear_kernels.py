"""Products with an NF4 weight on tensor cores, y = x W^T and dx = dY W, each with the delta of an adapter.

For weights whose rows are made of runs: a run is elements that share an absmax, and is whole bytes. Features
are the rows of a tile and tokens its columns: a tensor core takes at least 16 rows, but 8 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.launch import VARYING
from ..core.products import add_part, dot, store_tile, sum_splits, takes_wgmma
from ..lora.dropout import kept
from ..lora.lora_adapters import delta_tile
from ..nf4.nf4_decode import absmax_of, decode, load_absmax, load_packed_absmax, stretch

RANKS = tl.constexpr(16)  # of an adapter at a time


@triton.jit
def load_run_absmax(weight, element, BLOCK_SHIFT: tl.constexpr):
    """The absmax of the blocks of `element`, int64 of any shape."""
    return load_absmax(weight, element >> BLOCK_SHIFT, tl.full(element.shape, True, tl.int1))


@triton.jit
def load_run_packed_absmax(weight, element, there, BLOCK_SHIFT: tl.constexpr):
    """What is stored of it, for `absmax_of`. `there`: whether the weight has elements."""
    return load_packed_absmax(weight, element >> BLOCK_SHIFT, tl.full(element.shape, True, tl.int1) & there)


@triton.jit
def finish_tile(
    out_ptr,
    acc,
    parts,
    bias_ptr,
    delta,
    mask,
    token,
    m,
    first,
    features,
    dtype: tl.constexpr,
    BLOCK_F: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Store the splits' sums [features, tokens], for activations of `dtype`, with what the first adds to
    them: mask(delta) and bias. `mask` and QUADS as in `kept`."""
    feature = first + tl.arange(0, BLOCK_F)
    if tl.program_id(1) == 0:
        if delta is not None:
            added = delta_tile(delta, token, m, feature, features, dtype, RANKS)
            if mask[0] is not None:
                keep = kept(mask, token.to(tl.int64), first, features, BLOCK_F, QUADS)
                added = tl.where(tl.trans(keep), added, 0.0)
            acc += delta.scale * added
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)[:, None]
    splits = tl.num_programs(1)
    total, last = sum_splits(acc, parts, tl.program_id(0) * splits, tl.program_id(1), splits)
    store_tile(out_ptr, total, token, m, feature, features, last)


@triton.jit
def linear_tile(
    x_ptr,
    weight,
    bias_ptr,
    delta,
    out_ptr,
    parts,
    token,
    m,
    first_feature,
    features,
    depth,
    split,
    mask,
    BLOCK_SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = x[m, depth] W[features, depth]^T + bias + delta, of the rows `token`, one after
    another, before m. A program sums over `split` times GROUPS RUN, of which depth is a multiple.

    RUN divides the blocksize, 2^BLOCK_SHIFT. Codes are multiplied as they are, and each run by its absmax
    afterwards. `mask` as in `kept`.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # What lies outside is read elsewhere, and not written.
    x_rows = tl.minimum(token, m - 1).to(tl.int64) * depth
    feature = first_feature + tl.arange(0, BLOCK_F)
    w_rows = tl.minimum(feature, features - 1).to(tl.int64) * depth
    STEP: tl.constexpr = GROUPS * RUN
    first = tl.program_id(1) * split * STEP

    # Sums may run in any order. For wgmma, byte j of a run stands at 4 (j % QUARTER) + j // QUARTER: so a
    # thread's operands are neighbours. For others the compiler finds such an order, and x can be copied in
    # longer vectors. Eight tokens make programs of more warps than wgmma has rows for.
    PERMUTED: tl.constexpr = takes_wgmma() and BLOCK_M > 8
    QUARTER: tl.constexpr = RUN // 8
    column = tl.arange(0, RUN)
    if PERMUTED:
        column = column // 2 % 4 * (2 * QUARTER) + column // 8 * 2 + column % 2
    x_tile = x_ptr + x_rows[:, None] + (first + column)[None, :]
    w_tile = weight.packed + (w_rows >> 1)[:, None] + (first // 2 + tl.arange(0, RUN // 2))[None, :]
    acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    # A run ahead: what is stored tells where to look up the absmax, so they would be waited for twice.
    stored = load_run_packed_absmax(weight, w_rows + first, depth > 0, BLOCK_SHIFT)
    for start in range(first, tl.minimum(first + split * STEP, depth), STEP):
        for group in tl.static_range(GROUPS):
            scales = absmax_of(weight, stored[0], stored[1])
            ahead = tl.minimum(start + (group + 1) * RUN, depth - RUN)
            stored = load_run_packed_absmax(weight, w_rows + ahead, True, BLOCK_SHIFT)
            packed = tl.load(w_tile + group * (RUN // 2))
            if PERMUTED:
                packed = tl.permute(tl.reshape(packed, (BLOCK_F, 4, QUARTER)), (0, 2, 1))
                packed = tl.reshape(packed, (BLOCK_F, RUN // 2))
            tokens = tl.trans(tl.load(x_tile + group * RUN))
            part = dot(decode(packed, dtype), tokens, dtype)
            acc += part * scales[:, None]
        x_tile += STEP
        w_tile += STEP // 2
    acc *= 1.0 / stretch(dtype)
    finish_tile(
        out_ptr, acc, parts, bias_ptr, delta, mask, token, m, first_feature, features, dtype, BLOCK_F, True
    )


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
    BLOCK_SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`linear_tile` of all rows."""
    m_tiles = tl.cdiv(m, BLOCK_M)
    # Neighbours read the same weights.
    token = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // m_tiles * BLOCK_F
    mask = (seed_ptr, stream, threshold)
    tensors = (x_ptr, weight, bias_ptr, delta, out_ptr, parts)
    sizes = (token, m, first, features, depth, split)
    linear_tile(*tensors, *sizes, mask, BLOCK_SHIFT, RUN, GROUPS, BLOCK_M, BLOCK_F)


@triton.jit
def linear_dx_tile(
    dy_ptr,
    weight,
    bias_ptr,
    delta,
    out_ptr,
    parts,
    token,
    m,
    first_feature,
    features,
    depth,
    split,
    mask,
    BLOCK_SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = dy[m, depth] W[depth, features] + bias + mask(delta), of the rows `token`, one after
    another, before m. A program sums over `split` times BLOCK_D.

    features are a multiple of RUN, and that divides the blocksize, 2^BLOCK_SHIFT.
    """
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
        numbers = decode(tl.load(weight.packed + byte), dtype).to(tl.float32)
        element = w_rows[:, None] + tl.minimum(run, features - 1)[None, :]
        scales = load_run_absmax(weight, element, BLOCK_SHIFT) * (1.0 / stretch(dtype))
        weights = tl.reshape(numbers, (BLOCK_D, RUNS, RUN)) * scales[:, :, None]
        weights = tl.reshape(weights, (BLOCK_D, BLOCK_F)).to(dtype)
        if dtype == tl.float32:
            acc = add_part(acc, dot(tl.trans(weights), tl.trans(gradients), dtype))
        else:
            acc = dot(tl.trans(weights), tl.trans(gradients), dtype, acc)
    finish_tile(
        out_ptr, acc, parts, bias_ptr, delta, mask, token, m, first_feature, features, dtype, BLOCK_F, True
    )


@triton.jit(do_not_specialize=VARYING)
def linear_dx_kernel(
    dy_ptr,
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
    BLOCK_SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`linear_dx_tile` of all rows."""
    m_tiles = tl.cdiv(m, BLOCK_M)
    token = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // m_tiles * BLOCK_F
    mask = (seed_ptr, stream, threshold)
    tensors = (dy_ptr, weight, bias_ptr, delta, out_ptr, parts)
    sizes = (token, m, first, features, depth, split)
    linear_dx_tile(*tensors, *sizes, mask, BLOCK_SHIFT, RUN, BLOCK_D, BLOCK_M, BLOCK_F)
