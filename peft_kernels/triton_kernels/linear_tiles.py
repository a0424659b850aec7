"""What kernels of linear layers do with tiles: products, NF4 weights, dropout masks, deltas of adapters."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_absmax, value_of
from .dropout import words_of


@triton.jit
def dot(a, b, acc):
    """acc + a b: operands of one type, sums in fp32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_exact(a, b, PTX: tl.constexpr):
    """a b for activations `a`, and `b` of a's type or in fp32; as good as in fp32.

    An fp32 number is the sum of three of bfloat16. For fp16 activations, which bfloat16 would round, NVIDIA's
    tensor cores take tf32 numbers, in parts too.
    """
    zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if a.dtype == b.dtype:
        product = dot(a, b, zero)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = dot(a, high, dot(a, middle, dot(a, low, zero)))
    elif PTX:
        product = tl.dot(a.to(tl.float32), b, zero, input_precision="tf32x3")
    else:
        product = dot(a.to(tl.float32), b, zero)
    return product


@triton.jit
def dot_wide(a, b, dtype: tl.constexpr):
    """a b, far better than a result of `dtype` shows: as in fp32, else by sixteen bits of each factor.

    `b` is fp32, and so is `a`, unless it is bfloat16.
    """
    zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if dtype == tl.float32:
        product = dot(a.to(tl.float32), b, zero)
    else:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        product = dot(a_high, b_low, zero)
        if a.dtype != tl.bfloat16:
            a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
            product = dot(a_low, b_high, product)
        product = dot(a_high, b_high, product)
    return product


@triton.jit
def load_elements(packed, absmax, absmax2, offset, dynamic_map, element, inside, BLOCK_SHIFT: tl.constexpr):
    """Weights one by one, fp32, 0 where `inside` is false: for rows that begin amid a byte or block.

    `element` is int64, `inside` of its shape.
    """
    byte = tl.load(packed + (element >> 1), mask=inside, other=0).to(tl.int32)
    code = tl.where((element & 1) == 0, byte >> 4, byte & 15)
    scale = load_absmax(absmax, absmax2, offset, dynamic_map, element >> BLOCK_SHIFT, inside)
    return tl.where(inside, value_of(code) * scale, 0.0)


@triton.jit
def load_run_absmax(absmax, absmax2, offset, dynamic_map, element, BLOCK_SHIFT: tl.constexpr):
    """The absmax of the blocks of `element`, int64 of any shape."""
    inside = tl.full(element.shape, True, tl.int1)
    return load_absmax(absmax, absmax2, offset, dynamic_map, element >> BLOCK_SHIFT, inside)


@triton.jit
def kept(seed, stream, threshold, token, first, features, WIDTH: tl.constexpr, QUADS: tl.constexpr):
    """Which elements of activations [.., features] dropout keeps: bool [rows, WIDTH].

    In the rows `token`, int64, from feature `first` on. QUADS: features and first are multiples of 4.
    """
    element = token * features + first
    if QUADS:
        block = (element >> 2)[:, None] + tl.arange(0, WIDTH // 4)[None, :]
        w0, w1, w2, w3 = words_of(seed, stream, block)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        each = element[:, None] + tl.arange(0, WIDTH)[None, :]
        w0, w1, w2, w3 = words_of(seed, stream, each >> 2)
        at = each & 3
        words = tl.where(at < 2, tl.where(at == 0, w0, w1), tl.where(at == 2, w2, w3))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def delta_tile(
    u,
    u_stride,
    token,
    m,
    v,
    v_stride,
    v_rank_stride,
    feature,
    features,
    rank,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What an adapter adds, v u^T [features, tokens], with u [m, rank] in fp32; for a result of `dtype`."""
    u_rows = tl.minimum(token, m - 1).to(tl.int64) * u_stride
    v_rows = tl.minimum(feature, features - 1).to(tl.int64) * v_stride
    sum = tl.zeros((feature.shape[0], token.shape[0]), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside = (r < rank)[None, :]
        u_part = tl.load(u + u_rows[:, None] + r[None, :], mask=inside, other=0.0)
        at = v_rows[:, None] + r.to(tl.int64)[None, :] * v_rank_stride
        v_part = tl.load(v + at, mask=inside, other=0.0)
        if v_part.dtype != tl.bfloat16:
            v_part = v_part.to(tl.float32)
        sum += dot_wide(v_part, tl.trans(u_part), dtype)
    return sum


@triton.jit
def store_tile(out, values, token, m, feature, features, SPLIT: tl.constexpr):
    """values [features, tokens] to out [m, features], rounded once; or, with SPLIT, as the part of this
    split in out [splits, m, features]."""
    at = out + token.to(tl.int64)[None, :] * features + feature[:, None]
    inside = (feature < features)[:, None] & (token < m)[None, :]
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * m * features
    tl.store(at, values.to(out.dtype.element_ty), mask=inside)
