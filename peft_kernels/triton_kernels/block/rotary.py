"""Rotary position embedding, with torch's roundings."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.common import check, check_dtype, check_float, check_shape
from ..core.launch import VARYING, cdiv, config, launch, power_of_2

ROTARY = config(4, 1)
PAIRS = 2048
"""Pairs of features of a program: several heads of a token, and several tokens of few heads."""


@triton.jit
def product(a, b, like, ROUNDS: tl.constexpr):
    """a * b, rounded to the dtype of `like` if ROUNDS."""
    value = a.to(tl.float32) * b.to(tl.float32)
    return value.to(like.dtype).to(tl.float32) if ROUNDS else value


@triton.jit(do_not_specialize=VARYING)
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_sequence,
    x_row,
    x_head,
    angle_sequence,
    m,
    rows,
    heads,
    half,
    INVERSE: tl.constexpr,
    ROUNDS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Some heads of some of the m tokens. ROUNDS: products and sums are rounded to x's dtype, which cos has
    too."""
    parts = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // parts * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    head = (tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS))[None, :, None]
    col = tl.arange(0, HALF)[None, None, :]
    sequence, row = (token // rows).to(tl.int64), (token % rows).to(tl.int64)
    angle = sequence * angle_sequence + row * (2 * half) + col
    known = (token < m) & (col < half)
    cos_a = tl.load(cos_ptr + angle, mask=known, other=0.0)
    cos_b = tl.load(cos_ptr + angle + half, mask=known, other=0.0)
    sin_a = tl.load(sin_ptr + angle, mask=known, other=0.0)
    sin_b = tl.load(sin_ptr + angle + half, mask=known, other=0.0)
    inside = known & (head < heads)
    at = x_ptr + sequence * x_sequence + row * x_row + head.to(tl.int64) * x_head + col
    a = tl.load(at, mask=inside, other=0.0)
    b = tl.load(at + half, mask=inside, other=0.0)
    if INVERSE:
        first = product(a, cos_a, a, ROUNDS) + product(b, sin_b, a, ROUNDS)
        second = product(b, cos_b, a, ROUNDS) - product(a, sin_a, a, ROUNDS)
    else:
        first = product(a, cos_a, a, ROUNDS) - product(b, sin_a, a, ROUNDS)
        second = product(b, cos_b, a, ROUNDS) + product(a, sin_b, a, ROUNDS)
    if ROUNDS:
        first, second = first.to(a.dtype), second.to(a.dtype)
    out = out_ptr + (token.to(tl.int64) * heads + head) * (2 * half) + col
    tl.store(out, first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + half, second.to(out_ptr.dtype.element_ty), mask=inside)


def rotary(args: Any) -> list[Tensor]:
    cos, sin = args.cos.contiguous(), args.sin.contiguous()
    check_float(cos, "cos")
    check(cos.dim() == 3, "cos", "shape (batch or 1, rows, features)", list(cos.shape))
    check(cos.shape[2] % 2 == 0, "cos", "an even number of features", cos.shape[2])
    check_dtype(sin, cos.dtype, "sin")
    check_shape(sin, cos.shape, "sin")
    return [_rotated(args, x, cos, sin) for x in args.x]


def _rotated(args: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sequences, rows, features = cos.shape
    check_float(x, "x")
    check_dtype(x, args.x[0].dtype, "x")
    fits = x.dim() == 4 and sequences in (1, x.shape[0]) and (x.shape[1], x.shape[3]) == (rows, features)
    check(fits, "x", f"shape ({sequences} or any, {rows}, heads, {features})", list(x.shape))
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=args.dtype, device=x.device)
    check_float(out, "dtype")
    batch, _, heads, _ = x.shape
    half = power_of_2(max(features // 2, 1))
    in_program = min(power_of_2(max(heads, 1)), max(PAIRS // half, 1))
    tokens = max(PAIRS // half // in_program, 1)
    strides = *x.stride()[:3], 0 if sequences == 1 else rows * features
    launch(
        rotary_kernel,
        (cdiv(batch * rows, tokens) * cdiv(heads, in_program),),
        *(x, cos, sin, out, *strides, batch * rows, rows, heads, features // 2),
        config=ROTARY,
        INVERSE=args.inverse,
        ROUNDS=x.dtype == cos.dtype != torch.float32,
        TOKENS=tokens,
        HEADS=in_program,
        HALF=half,
        enable_fp_fusion=False,
    )
    return out
