"""DoRA: the row norms of W0 + s B A, and the magnitudes' part of a layer with its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check, check_dtype, check_float, check_shape, matching, nf4
from .decode import load_absmax, value_of
from .launch import launch

SCALE_CONFIGS = [triton.Config({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4)]
BACKWARD_CONFIGS = [triton.Config({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=8)]
NORM_CONFIGS = [triton.Config({"BLOCK_N": 32, "BLOCK_K": 64}, num_warps=8, num_stages=2)]

CHUNK = 256  # rows that one program sums
RANKS = 64  # of A that one program multiplies with W


@triton.jit
def scale_kernel(z, scale, bias, out, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    strips = tl.cdiv(n, BLOCK_N)
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % strips * BLOCK_N + tl.arange(0, BLOCK_N)
    there = col < n
    s = tl.load(scale + col, mask=there, other=0.0)[None, :]
    at = row[:, None] * n + col[None, :]
    inside = (row < m)[:, None] & there[None, :]
    values = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    if bias is None:
        values = values * s
    else:
        b = tl.load(bias + col, mask=there, other=0.0).to(tl.float32)
        values += (s - 1.0) * (values - b[None, :])
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scale_backward_kernel(
    dy, z, scale, bias, dz, sums, m, n, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dz, and of each chunk of rows its part of dscale: sums[chunks, n]."""
    strips = tl.cdiv(n, BLOCK_N)
    chunk = (tl.program_id(0) // strips).to(tl.int64)
    col = tl.program_id(0) % strips * BLOCK_N + tl.arange(0, BLOCK_N)
    there = col < n
    s = tl.load(scale + col, mask=there, other=0.0)[None, :]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, CHUNK, BLOCK_M):
        row = chunk * CHUNK + first + tl.arange(0, BLOCK_M)
        at = row[:, None] * n + col[None, :]
        inside = (row < m)[:, None] & there[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz + at, (d * s).to(dz.dtype.element_ty), mask=inside)
        if bias is not None:
            values -= tl.load(bias + col, mask=there, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(d * values, axis=0)
    tl.store(sums + chunk * n + col, total, mask=there)


@triton.jit
def norm_kernel(
    weight,
    absmax,
    absmax2,
    offset,
    dynamic_map,
    a,
    b,
    squares,
    n,
    k,
    r,
    scaling,
    BLOCKSIZE: tl.constexpr,
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
        if absmax is None:
            w = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
        else:
            byte = tl.load(weight + element // 2, mask=inside, other=0).to(tl.int32)
            code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
            scale = load_absmax(absmax, absmax2, offset, dynamic_map, element // BLOCKSIZE, inside)
            w = value_of(code) * scale
        square += tl.sum(w * w, axis=1)
        # [BLOCK_K, RANKS]
        at = rank[None, :] * k + col[:, None]
        a_t = tl.load(a + at, mask=(rank < r)[None, :] & (col < k)[:, None], other=0.0).to(tl.float32)
        product = tl.dot(w, a_t, product, input_precision="ieee")
    there = (row < n)[:, None] & (rank < r)[None, :]
    factor = tl.load(b + row[:, None] * r + rank[None, :], mask=there, other=0.0).to(tl.float32)
    total = 2.0 * scaling * tl.sum(product * factor, axis=1)
    total += tl.where(part == 0, square, 0.0)
    tl.store(squares + part * n + row, total, mask=row < n)


def dora_norm(
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    dims = f"{lora_a.dim()}, {lora_b.dim()}"
    check(lora_a.dim() == lora_b.dim() == 2, "lora_a, lora_b", "2 dimensions", dims)
    (r, k), n = lora_a.shape, lora_b.shape[0]
    check_shape(lora_b, (n, r), "lora_b")
    check_float(lora_a, "lora_a")
    check_float(lora_b, "lora_b")
    if absmax is None:
        check_float(weight, "weight")
        check_shape(weight, (n, k), "weight")
        base: tuple[Tensor | None, ...] = (weight.contiguous(), None, None, None, None)
    else:
        base = nf4(weight, absmax, absmax2, offset, blocksize, n * k)[:5]
    a, b = lora_a.float().contiguous(), lora_b.float().contiguous()
    parts = max(triton.cdiv(r, RANKS), 1)
    squares = a.new_empty((parts, n))
    launch(
        norm_kernel,
        lambda meta: (parts * triton.cdiv(n, meta["BLOCK_N"]),),
        *base,
        a,
        b,
        squares,
        n,
        k,
        r,
        scaling,
        configs=NORM_CONFIGS,
        BLOCKSIZE=blocksize,
        RANKS=RANKS,
    )
    delta = ((b @ (a @ a.t())) * b).sum(1)
    return (squares.sum(0) + scaling**2 * delta).clamp_min_(0).sqrt_()


def dora_scale(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    z, scale, bias = _checked(z, scale, bias)
    out = torch.empty_like(z)
    m, n = _rows(z), z.shape[-1]
    launch(
        scale_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),),
        z,
        scale,
        bias,
        out,
        m,
        n,
        configs=SCALE_CONFIGS,
    )
    return out


def dora_scale_backward(dy: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    z, scale, bias = _checked(z, scale, bias)
    dy = matching(dy, z, "dy")
    dz = torch.empty_like(z)
    m, n = _rows(z), z.shape[-1]
    chunks = triton.cdiv(m, CHUNK)
    sums = scale.new_empty((chunks, n))
    launch(
        scale_backward_kernel,
        lambda meta: (chunks * triton.cdiv(n, meta["BLOCK_N"]),),
        dy,
        z,
        scale,
        bias,
        dz,
        sums,
        m,
        n,
        configs=BACKWARD_CONFIGS,
        CHUNK=CHUNK,
    )
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
