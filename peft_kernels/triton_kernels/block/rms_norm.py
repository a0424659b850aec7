"""Root mean square norms, alone or of a sum with a residual, and their gradients.

A program holds whole rows in registers, so each tensor is read and written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.common import check, check_dtype, check_float, check_shape, dtype_name, matching
from ..core.launch import VARYING, Config, cdiv, config, launch, power_of_2

SHORT, LONG = config(8, 1), config(16, 1)  # rows of up to TILE features, and longer ones
TILE = 4096
"""Elements of a program, several rows of a head's norm or one row of a model's."""
SUMMED = 32
"""Rows over which a program sums the weight's gradient, whatever the card."""


class Tile(NamedTuple):
    """What a program holds."""

    rows: int
    features: int
    config: Config


@triton.jit
def rounded_like(value, ptr):
    return value.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    features,
    eps,
    offset,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norms of x, or of x + residual, which is stored in `sum`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < features)[None, :]
    at = row[:, None] * features + col[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x = rounded_like(x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32), sum_ptr)
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
    mean = tl.div_rn(tl.sum(x * x, axis=1), tl.cast(features, tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    normed = x * rstd[:, None]
    if ROUNDS:
        normed = rounded_like(normed, x_ptr if sum_ptr is None else sum_ptr)
    weight = tl.load(weight_ptr + col, mask=col < features, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + at, (weight[None, :] * normed).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    add_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    features,
    offset,
    split,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx (+ add), and the weight's gradient summed over `split` times ROWS rows: sums[programs, features].
    Pointers of gradients that are not needed are None."""
    col = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for part in range(split):
        row = (tl.program_id(0).to(tl.int64) * split + part) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < features)[None, :]
        at = row[:, None] * features + col[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        if sums_ptr is not None:
            total += dy * (rounded_like(normed, x_ptr) if ROUNDS else normed)
        if dx_ptr is not None:
            # Loaded again for each row: in registers it would not leave room for long rows.
            weight = tl.load(weight_ptr + col, mask=col < features, other=0.0).to(tl.float32) + offset
            d = dy * weight[None, :]
            mean = tl.div_rn(tl.sum(d * normed, axis=1), tl.cast(features, tl.float32))
            dx = rstd * (d - normed * mean[:, None])
            if add_ptr is not None:
                dx += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        at = sums_ptr + tl.program_id(0).to(tl.int64) * features + col
        tl.store(at, tl.sum(total, axis=0), mask=col < features)


def rms_norm(args: Any) -> tuple[Tensor, Tensor]:
    x = _checked(args.x, args.weight)
    return _normed(args, x.dtype, x, None, None)


def add_rms_norm(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = _checked(args.x, args.weight)
    check_float(args.residual, "residual")
    check_shape(args.residual, x.shape, "residual")
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, args.residual.dtype))
    y, rstd = _normed(args, total.dtype, x, args.residual.contiguous(), total)
    return y, total, rstd


def rms_norm_backward(args: Any) -> tuple[Tensor, Tensor]:
    x, weight = _checked(args.x, args.weight), args.weight.contiguous()
    _check_result(args.dy.dtype, x.dtype, "dy")
    check_shape(args.dy, x.shape, "dy")
    check_dtype(args.rstd, torch.float32, "rstd")
    check_shape(args.rstd, x.shape[:-1], "rstd")
    add = None if args.add is None else matching(args.add, x, "add")
    features = len(weight)
    tile = _tile(features)
    split = max(SUMMED // tile.rows, 1) if args.need_dweight else 1
    rows = x.numel() // features
    programs = cdiv(rows, tile.rows * split)
    dx = torch.empty_like(x) if args.need_dx else None
    sums = x.new_empty((programs, features), dtype=torch.float32) if args.need_dweight else None
    tensors = args.dy.contiguous(), x, weight, args.rstd.contiguous(), add, dx, sums
    if args.need_dx or args.need_dweight:
        sizes = rows, features, args.offset, split
        _launch(rms_norm_backward_kernel, programs, tile, args.rounds, *tensors, *sizes)
    dweight = weight.new_empty(0) if sums is None else sums.sum(0).to(weight.dtype)
    return x.new_empty(0) if dx is None else dx, dweight


def _normed(
    args: Any, dtype: torch.dtype, x: Tensor, residual: Tensor | None, total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm of x or `total`, which is of dtype `dtype`, and its rstd."""
    _check_result(args.dtype, dtype, "dtype")
    y, rstd = torch.empty_like(x, dtype=args.dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, features = rstd.numel(), len(args.weight)
    tile = _tile(features)
    tensors = x, residual, total, args.weight.contiguous(), y, rstd
    sizes = rows, features, args.eps, args.offset
    _launch(rms_norm_kernel, cdiv(rows, tile.rows), tile, args.rounds, *tensors, *sizes)
    return y, rstd


def _tile(features: int) -> Tile:
    block = power_of_2(features)
    return Tile(max(TILE // block, 1), block, SHORT if block <= TILE else LONG)


def _launch(kernel: object, programs: int, tile: Tile, rounds: bool, *args: Any) -> None:
    constants = {"ROUNDS": rounds, "ROWS": tile.rows, "BLOCK": tile.features}
    # Fused with the first sum across threads, products would be rounded in one thread of a pair only: threads
    # of a row would disagree on its rms.
    constants["enable_fp_fusion"] = False
    launch(kernel, (programs,), *args, config=tile.config, **constants)


def _checked(x: Tensor, weight: Tensor) -> Tensor:
    """x, contiguous."""
    check_float(x, "x")
    check_float(weight, "weight")
    check(weight.dim() == 1 and weight.numel() > 0, "weight", "shape (features,)", list(weight.shape))
    features, got = weight.numel(), x.shape[-1] if x.dim() else 0
    check(got == features, "x", f"{features} features", got)
    return x.contiguous()


def _check_result(dtype: torch.dtype, of_x: torch.dtype, name: str) -> None:
    """Raises unless kernels return y in `dtype` for an x of `of_x`."""
    fits = dtype in (of_x, torch.float32) or of_x == torch.float32
    check(fits, name, f"Float or {dtype_name(of_x)} like x", dtype_name(dtype))
