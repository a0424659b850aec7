"""Linear layers with a frozen NF4 weight: y = x W^T + bias and dx = dY W."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .adapters import Delta, mask_args
from .common import Nf4, check, check_dtype, check_float, check_shape, nf4
from .launch import launch
from .linear_kernels import linear_dx_kernel, linear_kernel
from .linear_pieces import backward_by_pieces, forward_by_pieces
from .linear_plan import Tiles, table_for, tiles_for
from .sums import split_sum

RUN = 64  # weights at a time
RANKS = 16  # of an adapter at a time


def linear(x: Tensor, weight: Nf4, n: int, bias: Tensor | None, delta: Delta | None = None) -> Tensor | None:
    """y [m, n] of x [m, k], contiguous; None when no kernel is for so many rows."""
    m, k = x.shape
    tiles = tiles_for(table_for(x.dtype, backward=False), m)
    if tiles is None:
        return None
    out = x.new_empty(m, n)
    if out.numel() == 0:
        return out
    run, aligned = _runs(weight, k, x.dtype)
    groups = math.gcd(k // run, tiles.groups) if aligned else 1
    split = split_sum(_programs(tiles, "BLOCK_N", m, n), k, groups * run, out)
    launch(
        linear_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]), split.count),
        x,
        *weight[:5],
        bias,
        *_delta_args(delta),
        split.target,
        m,
        n,
        k,
        split.depth,
        *_delta_sizes(delta),
        configs=tiles.configs,
        key=(tiles.rows, n, k, x.dtype, weight.blocksize, weight.absmax.dtype, delta is None),
        BLOCK_SHIFT=weight.blocksize.bit_length() - 1,
        ALIGNED=aligned,
        SPLIT=split.count > 1,
        BLOCK_K=run,
        GROUPS=groups,
        BLOCK_R=RANKS,
    )
    split.finish()
    return out


def linear_dx(dy: Tensor, weight: Nf4, k: int, delta: Delta | None = None) -> Tensor | None:
    """dx [m, k] of dy [m, n], contiguous; None when no kernel is for so many rows."""
    m, n = dy.shape
    tiles = tiles_for(table_for(dy.dtype, backward=True), m)
    if tiles is None:
        return None
    out = dy.new_empty(m, k)
    if out.numel() == 0:
        return out
    run, aligned = _runs(weight, k, dy.dtype)
    block_n = RUN if aligned and dy.dtype != torch.float32 else 32  # registers do not hold more one by one
    split = split_sum(_programs(tiles, "BLOCK_K", m, k), n, block_n, out)
    mask = None if delta is None else delta.mask
    launch(
        linear_dx_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(k, meta["BLOCK_K"]), split.count),
        dy,
        *weight[:5],
        *_delta_args(delta),
        split.target,
        m,
        n,
        k,
        split.depth,
        *_delta_sizes(delta),
        *mask_args(mask),
        configs=tiles.configs,
        key=(tiles.rows, n, k, dy.dtype, weight.blocksize, weight.absmax.dtype, delta is None, mask is None),
        BLOCK_SHIFT=weight.blocksize.bit_length() - 1,
        ALIGNED=aligned,
        SPLIT=split.count > 1,
        QUADS=k % 4 == 0,
        RUN=run,
        BLOCK_N=block_n,
        BLOCK_R=RANKS,
    )
    split.finish()
    return out


def _runs(weight: Nf4, k: int, dtype: torch.dtype) -> tuple[int, bool]:
    """How many weights of a row go together, and whether they always share an absmax and whole bytes."""
    for run in (RUN, RUN // 2):
        if k % run == 0 and weight.blocksize % run == 0 and (run < RUN or dtype != torch.float32):
            return run, True
    return RUN // 2, False


def _programs(tiles: Tiles, block: str, rows: int, features: int) -> int:
    sizes = tiles.configs[0].kwargs
    return triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(features, sizes[block])


def _delta_args(delta: Delta | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if delta is None else (delta.u, delta.v)


def _delta_sizes(delta: Delta | None) -> tuple[int, int, float]:
    if delta is None:
        return 0, 0, 1.0
    return delta.u.shape[1], delta.u.stride(0), delta.factor


def product(x: Tensor, weight: Nf4, n: int, bias: Tensor | None) -> Tensor:
    """y of any number of rows."""
    y = linear(x, weight, n, bias)
    return forward_by_pieces(x, weight, n, bias) if y is None else y


def product_dx(dy: Tensor, weight: Nf4, k: int) -> Tensor:
    dx = linear_dx(dy, weight, k)
    return backward_by_pieces(dy, weight, k) if dx is None else dx


# The ops


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    rows = as_rows(x, "x")
    weight = nf4(packed, absmax, absmax2, offset, blocksize, out_features * rows.shape[1])
    if bias is not None:
        bias = checked_bias(bias, out_features, x.dtype)
    return product(rows, weight, out_features, bias).view(*x.shape[:-1], out_features)


def nf4_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    in_features: int,
) -> Tensor:
    rows = as_rows(dy, "dy")
    weight = nf4(packed, absmax, absmax2, offset, blocksize, rows.shape[1] * in_features)
    return product_dx(rows, weight, in_features).view(*dy.shape[:-1], in_features)


def as_rows(t: Tensor, name: str) -> Tensor:
    """Activations as rows, contiguous."""
    check_float(t, name)
    check(t.dim() >= 1, name, "at least 1 dimension", t.dim())
    return t.contiguous().view(math.prod(t.shape[:-1]), t.shape[-1])


def checked_bias(bias: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Of a layer, contiguous."""
    check_float(bias, "bias")
    if bias.dtype != torch.float32:
        check_dtype(bias, dtype, "bias")
    check_shape(bias, (features,), "bias")
    return bias.contiguous()
