"""DoRA: scales a layer's output by its magnitudes, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.common import check, check_dtype, check_float, check_shape, matching
from ..core.launch import VARYING, cdiv, config, launch

SCALE = config(4, 3, BLOCK_M=16, BLOCK_N=128)
SCALE_BACKWARD = config(8, 3, BLOCK_M=16, BLOCK_N=128)

CHUNK = 256  # rows per program


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
    """dz, and the partial dscale of each chunk of rows: sums[chunks, n]."""
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
