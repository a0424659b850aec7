"""DoRA: the row norms of W0 + s B A, and the magnitudes' part of a layer with its gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check, check_dtype, check_float, check_shape, matching
from .launch import VARYING, cdiv, config, launch
from .nf4 import Nf4, Pointers, nf4
from .nf4_decode import load_elements
from .products import dot

SCALE = config(4, 3, BLOCK_M=16, BLOCK_N=128)
SCALE_BACKWARD = config(8, 3, BLOCK_M=16, BLOCK_N=128)
NORM = config(8, 2, BLOCK_N=32, BLOCK_K=64)

CHUNK = 256  # rows that one program sums
RANKS = 64  # of A that one program multiplies with W


@triton.jit(do_not_specialize=VARYING)
def scale_kernel(z_ptr, scale_ptr, bias_ptr, out_ptr, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    strips = tl.cdiv(n, BLOCK_N)
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % strips * BLOCK_N + tl.arange(0, BLOCK_N)
    there = col < n
    s = tl.load(scale_ptr + col, mask=there, other=0.0)[None, :]
    at = row[:, None] * n + col[None, :]
    inside = (row < m)[:, None] & there[None, :]
    values = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is None:
        values = values * s
    else:
        b = tl.load(bias_ptr + col, mask=there, other=0.0).to(tl.float32)
        values += (s - 1.0) * (values - b[None, :])
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def scale_backward_kernel(
    dy_ptr,
    z_ptr,
    scale_ptr,
    bias_ptr,
    dz_ptr,
    sums_ptr,
    m,
    n,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dz, and of each chunk of rows its part of dscale: sums[chunks, n]."""
    strips = tl.cdiv(n, BLOCK_N)
    chunk = (tl.program_id(0) // strips).to(tl.int64)
    col = tl.program_id(0) % strips * BLOCK_N + tl.arange(0, BLOCK_N)
    there = col < n
    s = tl.load(scale_ptr + col, mask=there, other=0.0)[None, :]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, CHUNK, BLOCK_M):
        row = chunk * CHUNK + first + tl.arange(0, BLOCK_M)
        at = row[:, None] * n + col[None, :]
        inside = (row < m)[:, None] & there[None, :]
        d = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz_ptr + at, (d * s).to(dz_ptr.dtype.element_ty), mask=inside)
        if bias_ptr is not None:
            values -= tl.load(bias_ptr + col, mask=there, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(d * values, axis=0)
    tl.store(sums_ptr + chunk * n + col, total, mask=there)


@triton.jit
def norm_kernel(
    weight,
    a_ptr,
    b_ptr,
    squares_ptr,
    n,
    k,
    r,
    scaling,
    BLOCK_SHIFT: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """squares[part, n]: ||W||^2 by row in part 0, and 2 s (W A^T) . B of the part's ranks in each."""
    tiles = tl.cdiv(n, BLOCK_N)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = part * RANKS + tl.arange(0, RANKS)
    product = tl.zeros((BLOCK_N, RANKS), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, k, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        element = row[:, None] * k + col[None, :]
        inside = (row < n)[:, None] & (col < k)[None, :]
        if weight.absmax is None:
            w = tl.load(weight.packed + element, mask=inside, other=0.0).to(tl.float32)
        else:
            w = load_elements(weight, element, inside, BLOCK_SHIFT)
        square += tl.sum(w * w, axis=1)
        # [BLOCK_K, RANKS]
        at = rank[None, :] * k + col[:, None]
        a_t = tl.load(a_ptr + at, mask=(rank < r)[None, :] & (col < k)[:, None], other=0.0).to(tl.float32)
        product = dot(w, a_t, tl.float32, product)
    there = (row < n)[:, None] & (rank < r)[None, :]
    factor = tl.load(b_ptr + row[:, None] * r + rank[None, :], mask=there, other=0.0).to(tl.float32)
    total = 2.0 * scaling * tl.sum(product * factor, axis=1)
    total += tl.where(part == 0, square, 0.0)
    tl.store(squares_ptr + part * n + row, total, mask=row < n)


def dora_norm(args: Any) -> Tensor:
    base, lora_a, lora_b, scaling = args
    dims = f"{lora_a.dim()}, {lora_b.dim()}"
    check(lora_a.dim() == lora_b.dim() == 2, "lora_a, lora_b", "2 dimensions", dims)
    (r, k), n = lora_a.shape, lora_b.shape[0]
    check_shape(lora_b, (n, r), "lora_b")
    check_float(lora_a, "lora_a")
    check_float(lora_b, "lora_b")
    if base.absmax is None:
        check_float(base.weight, "weight")
        check_shape(base.weight, (n, k), "weight")
        weight = Nf4(Pointers(base.weight.contiguous()), base.blocksize)
    else:
        weight = nf4(base, n * k)
    a, b = lora_a.float().contiguous(), lora_b.float().contiguous()
    parts = max(cdiv(r, RANKS), 1)
    squares = a.new_empty((parts, n))
    grid = (parts * cdiv(n, NORM["BLOCK_N"]),)
    tensors = weight.pointers, a, b, squares, n, k, r, scaling
    launch(norm_kernel, grid, *tensors, config=NORM, BLOCK_SHIFT=weight.shift, RANKS=RANKS)
    delta = ((b @ (a @ a.t())) * b).sum(1)
    return (squares.sum(0) + scaling**2 * delta).clamp_min_(0).sqrt_()


def dora_scale(args: Any) -> Tensor:
    z, scale, bias = _checked(*args)
    out = torch.empty_like(z)
    m, n = _rows(z), z.shape[-1]
    grid = (cdiv(m, SCALE["BLOCK_M"]) * cdiv(n, SCALE["BLOCK_N"]),)
    launch(scale_kernel, grid, z, scale, bias, out, m, n, config=SCALE)
    return out


def dora_scale_backward(args: Any) -> tuple[Tensor, Tensor]:
    z, scale, bias = _checked(args.z, args.scale, args.bias)
    dy = matching(args.dy, z, "dy")
    dz = torch.empty_like(z)
    m, n = _rows(z), z.shape[-1]
    chunks = cdiv(m, CHUNK)
    sums = scale.new_empty((chunks, n))
    grid = (chunks * cdiv(n, SCALE_BACKWARD["BLOCK_N"]),)
    tensors = dy, z, scale, bias, dz, sums, m, n
    launch(scale_backward_kernel, grid, *tensors, config=SCALE_BACKWARD, CHUNK=CHUNK)
    return dz, sums.sum(0)


def _checked(z: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    check(z.dim() >= 1, "z", "at least 1 dimension", z.dim())
    check_float(z, "z")
    check_dtype(scale, torch.float32, "scale")
    check_shape(scale, z.shape[-1:], "scale")
    if bias is not None:
        check_float(bias, "bias")
        check_shape(bias, z.shape[-1:], "bias")
        bias = bias.contiguous()
    return z.contiguous(), scale.contiguous(), bias


def _rows(t: Tensor) -> int:
    return t.shape[:-1].numel()
