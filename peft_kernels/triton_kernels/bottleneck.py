"""Bottleneck adapters: each direction is one launch from features to ranks and back to features.

A program computes a tile of rows. It stores the ranks to global memory and reads them back, since a thread
needs ranks that other threads of the program computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.op import OPS
from ..ops.common import empty_unless
from .core.common import check, check_dtype, check_shape, matching
from .core.dropout import Mask, check_dropout, keep_mask, pack_mask, unpack_mask
from .core.gemm import multiprocessors, store_tile, sync_stores, triton_dtype
from .core.launch import VARYING, cdiv, config, launch
from .core.lora_delta import Delta, Selection, SelectionArgs, check_factor, delta_args, delta_tile
from .gated import ACTIVATIONS, activate
from .linear.linear import as_rows
from .lora.lora_gemms import Gemm, over_rows, rank_block, shrink_sum, summed_rank_block

FEW = config(4, 2, BLOCK_M=16, BLOCK_F=128)
MANY = config(8, 2, BLOCK_M=64, BLOCK_F=64)
MAX_SUMMED = 32  # ranks per step when one factor is fp32


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


@triton.jit
def dropout_factor(mask, scale, row, first, ranks, QUADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The dropout factor of ranks from `first` on. A factor, not a selection: a dropped NaN stays NaN."""
    factor = tl.full((row.shape[0], BLOCK_R), 1.0, tl.float32)
    if mask.seed is not None:
        factor = tl.where(keep_mask(unpack_mask(mask), row, first, ranks, BLOCK_R, QUADS), scale, 0.0)
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
    m,
    features,
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
    up_bias); u, v and scale are those of `delta`. Where 0 is added, y is bit-equal to the residual."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)
    for first in range(0, shrink.rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        z = shrink_sum(shrink, row, row < m, r, 0, shrink.features, False, BLOCK_K)
        if down_bias_ptr is not None:
            z += tl.load(down_bias_ptr + r, mask=r < shrink.rank, other=0.0).to(tl.float32)[None, :]
        at = row[:, None] * shrink.rank + r[None, :]
        inside = (row < m)[:, None] & (r < shrink.rank)[None, :]
        tl.store(z_ptr + at, z, mask=inside)
        value, _ = activate(z, ACTIVATION, True)
        value *= dropout_factor(mask, mask_scale, row, first, shrink.rank, QUADS, BLOCK_R)
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
        inside = (feature < features)[:, None] & (token < m)[None, :]
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(added == 0.0, residual, residual + added)
        store_tile(y_ptr, y, token, m, feature, features, True)


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
    m,
    features,
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
    0."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)
    for first in range(0, shrink.rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        at = row[:, None] * shrink.rank + r[None, :]
        inside = (row < m)[:, None] & (r < shrink.rank)[None, :]
        value, derivative = activate(tl.load(z_ptr + at, mask=inside, other=0.0), ACTIVATION, True)
        factor = dropout_factor(mask, mask_scale, row, first, shrink.rank, QUADS, BLOCK_R)
        if value_ptr is not None:
            tl.store(value_ptr + at, value * factor, mask=inside)
        if dz_ptr is not None:
            d = shrink_sum(shrink, row, row < m, r, 0, shrink.features, False, BLOCK_K)
            tl.store(dz_ptr + at, d * scaling * factor * derivative, mask=inside)
    if dx_ptr is not None:
        sync_stores(dz_ptr.to(tl.pointer_type(tl.int32)))
        for first in range(0, features, BLOCK_F):
            feature = first + tl.arange(0, BLOCK_F)
            dx = delta_tile(delta, token, m, feature, features, DTYPE, SUM_R)
            if dy_ptr is not None:
                at = row[None, :] * features + feature[:, None]
                inside = (feature < features)[:, None] & (token < m)[None, :]
                dx += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            store_tile(dx_ptr, dx, token, m, feature, features, True)


class Checked(NamedTuple):
    """The operands of both directions, checked."""

    x: Tensor  # [m, k]
    down: Tensor  # [r, k], contiguous like up
    up: Tensor  # [n, r]
    mask: Mask | None


def bottleneck(args: Any) -> tuple[Tensor, Tensor]:
    x, down, up, mask = _checked(args)
    if not _is_fused(args):
        y, z = OPS["bottleneck"].plain(*args)
        return y, z
    r, n = down.shape[0], up.shape[0]
    _check_outputs(args.residual is None, x, up)
    down_bias, up_bias = _vector(args.down_bias, r, x, "down_bias"), _vector(args.up_bias, n, x, "up_bias")
    y = x.new_empty((*args.x.shape[:-1], n))
    z = x.new_empty((*args.x.shape[:-1], r), dtype=torch.float32)
    residual = x if args.residual is None else matching(args.residual, y, "residual")
    delta = Delta(z.new_empty((x.shape[0], r)), up, args.scaling, Selection())
    tensors = shrink_args(x, down.t()), down_bias, z, pack_mask(mask), _scale(mask)
    rest = delta_args(delta), up_bias, residual, y
    _run(bottleneck_kernel, args, x.shape[0], *tensors, *rest, x.shape[0], n)
    return y, z


def bottleneck_backward(args: Any) -> tuple[Tensor, ...]:
    x, down, up, mask = _checked(args)
    (m, k), r, n = x.shape, down.shape[0], up.shape[0]
    _check_outputs(args.adds_dy, x, up)
    check_dtype(args.dy, x.dtype, "dy")
    check_shape(args.dy, (*args.x.shape[:-1], n), "dy")
    check_dtype(args.z, torch.float32, "z")
    check_shape(args.z, (*args.x.shape[:-1], r), "z")
    if not _is_fused(args):
        found: tuple[Tensor, ...] = OPS["bottleneck_backward"].plain(*args)
        return found
    dy, z = as_rows(args.dy, "dy"), as_rows(args.z, "z")
    need_dz = args.need_dx or args.need_ddown or args.need_ddown_bias
    value = torch.empty_like(z) if args.need_dup else None
    dz = torch.empty_like(z) if need_dz else None
    dx, ddown, dup = (
        empty_unless(need, t)
        for need, t in ((args.need_dx, args.x), (args.need_ddown, down), (args.need_dup, up))
    )
    delta = Delta(dz, down.t(), 1.0, Selection()) if dz is not None and args.need_dx else None
    if value is not None or dz is not None:
        tensors = shrink_args(dy, up), z, value, dz, pack_mask(mask), _scale(mask), args.scaling
        rest = delta_args(delta), dy if args.adds_dy else None, dx if args.need_dx else None
        _run(bottleneck_backward_kernel, args, m, *tensors, *rest, m, k)
    sums = []
    if dz is not None and args.need_ddown:
        sums.append(Gemm(x, dz, ddown.t(), 1.0, Selection()))
    if value is not None:
        sums.append(Gemm(dy, value, dup, args.scaling, Selection()))
    over_rows(sums)
    nothing = z.new_empty(0)
    ddown_bias = dz.sum(0) if dz is not None and args.need_ddown_bias else nothing
    dup_bias = args.scaling * dy.sum(0, dtype=z.dtype) if args.need_dup_bias else z.new_empty(0)
    return dx, x.new_empty(0), nothing.clone(), ddown, ddown_bias, dup, dup_bias


def _is_fused(args: Any) -> bool:
    """The kernels have no layer norm: with one the op runs the reference."""
    return args.norm_weight is None


def _run(kernel: object, args: Any, rows: int, *rest: Any) -> None:
    """Launches a kernel with the arguments `rest`."""
    dtype, rank = args.x.dtype, args.down.shape[0]
    # Small tiles while large ones would leave multiprocessors idle, and where fp32 sums need the registers.
    few = dtype == torch.float32 or rows <= MANY["BLOCK_M"] * multiprocessors(args.x.device)
    tiles = FEW if few else MANY
    constants = {"ACTIVATION": args.activation, "DTYPE": triton_dtype(dtype), "QUADS": rank % 4 == 0}
    # fp32 operands are split into parts, which need registers.
    wide = torch.float32 in (args.down.dtype, args.up.dtype)
    blocks = {"BLOCK_K": 32 if wide else 64, "BLOCK_R": rank_block(rank)}
    blocks["SUM_R"] = min(summed_rank_block(rank, dtype), MAX_SUMMED)
    launch(kernel, (cdiv(rows, tiles["BLOCK_M"]),), *rest, config=tiles, **constants, **blocks)


def _scale(mask: Mask | None) -> float:
    return 1.0 if mask is None else mask.scale


def _checked(args: Any) -> Checked:
    """The op's operands. Raises RuntimeError where they do not fit."""
    x, down, up = as_rows(args.x, "x"), args.down, args.up
    check_factor(down, x.dtype, "down")
    check_factor(up, x.dtype, "up")
    check(down.numel() > 0, "down", "elements", f"shape {list(down.shape)}")
    check(down.shape[1] == x.shape[1], "x", f"{down.shape[1]} features", x.shape[1])
    check_shape(up, (up.shape[0], down.shape[0]), "up")
    check(args.activation in ACTIVATIONS, "activation", "silu, gelu, gelu_tanh or relu", args.activation)
    for name in ("norm_weight", "norm_bias"):
        _vector(getattr(args, name), x.shape[1], x, name)
    check_dropout(args.dropout_p, args.seed)
    mask = None if args.dropout_p == 0 else Mask(args.seed, 0, args.dropout_p)
    return Checked(x, down.contiguous(), up.contiguous(), mask)


def _check_outputs(x_is_residual: bool, x: Tensor, up: Tensor) -> None:
    k, n = x.shape[1], up.shape[0]
    check(n == k or not x_is_residual, "up", f"{k} rows like x, the residual, has features", n)


def _vector(t: Tensor | None, size: int, x: Tensor, name: str) -> Tensor | None:
    """A bias or norm parameter, contiguous. Raises unless it fits."""
    if t is None:
        return None
    check_factor(t, x.dtype, name, dims=1)
    check_shape(t, (size,), name)
    return t.contiguous()
