"""The kernels for an NF4 weight whose rows begin amid a byte or block: its elements are read one by one. So
can be those of a dense weight."""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.launch import VARYING
from ..core.products import add_part, dot
from ..nf4.nf4_decode import load_elements
from .linear_kernels import finish_tile

BLOCK_D = tl.constexpr(32)  # registers do not hold more, one by one


@triton.jit
def load_any(weight, element, mask, BLOCK_SHIFT: tl.constexpr):
    """`load_elements`, of a dense weight too."""
    if weight.absmax is None:
        return tl.load(weight.packed + element, mask=mask, other=0.0)
    else:
        return load_elements(weight, element, mask, BLOCK_SHIFT)


@triton.jit
def unaligned_tile(
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
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = x[m, depth] W + bias + mask(delta), of the rows `token`, one after another,
    before m. A program sums over `split` times BLOCK_D.

    W is the weight [depth, features] with BACKWARD, else the transpose of the weight [features, depth].
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # What lies outside is read elsewhere, and not written.
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
            weights = tl.trans(load_any(weight, element, inside, BLOCK_SHIFT).to(dtype))
        else:
            element = feature[:, None] * depth + at[None, :]
            inside = tl.broadcast_to((at < depth)[None, :], (BLOCK_F, BLOCK_D))
            weights = load_any(weight, element, inside, BLOCK_SHIFT).to(dtype)
        if dtype == tl.float32:
            acc = add_part(acc, dot(weights, tl.trans(tokens), dtype))
        else:
            acc = dot(weights, tl.trans(tokens), dtype, acc)
    finish_tile(
        out_ptr, acc, parts, bias_ptr, delta, mask, token, m, first_feature, features, dtype, BLOCK_F, False
    )


@triton.jit(do_not_specialize=VARYING)
def unaligned_product_kernel(
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
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`unaligned_tile` of all rows."""
    m_tiles = tl.cdiv(m, BLOCK_M)
    token = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // m_tiles * BLOCK_F
    mask = (seed_ptr, stream, threshold)
    tensors = (x_ptr, weight, bias_ptr, delta, out_ptr, parts)
    sizes = (token, m, first, features, depth, split)
    unaligned_tile(*tensors, *sizes, mask, BLOCK_SHIFT, BACKWARD, BLOCK_M, BLOCK_F)


@triton.jit(do_not_specialize=VARYING)
def unaligned_piece_kernel(
    weight,
    out_ptr,
    first_row,
    rows,
    first_col,
    cols,
    k,
    out_stride,
    BLOCK_SHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Part of a weight [.., k] into out."""
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row = tl.program_id(0) // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(0) % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    element = ((first_row + row).to(tl.int64) * k + first_col)[:, None] + col[None, :]
    weights = load_elements(weight, element, inside, BLOCK_SHIFT)
    at = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(at, weights.to(out_ptr.dtype.element_ty), mask=inside)
