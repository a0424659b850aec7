"""Bottleneck adapters: each direction is one launch (`bottleneck_kernels`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.op import OPS
from ...ops.common import empty_unless
from ..core.common import check, check_dtype, check_shape, matching
from ..core.dropout import Mask, check_dropout, pack_mask
from ..core.gemm import multiprocessors, triton_dtype
from ..core.launch import cdiv, config, launch
from ..core.lora_delta import Delta, Selection, check_factor, delta_args
from ..gated import ACTIVATIONS
from ..linear.linear import as_rows
from ..lora.lora_gemms import Gemm, over_rows, rank_block, summed_rank_block
from .bottleneck_kernels import OwnRows, bottleneck_backward_kernel, bottleneck_kernel, shrink_args

FEW = config(4, 2, BLOCK_M=16, BLOCK_F=128)
MANY = config(8, 2, BLOCK_M=64, BLOCK_F=64)
MAX_SUMMED = 32  # ranks per step when one factor is fp32


class Adapter(NamedTuple):
    """The operands of both directions, checked."""

    x: Tensor  # [m, k]
    down: Tensor  # [r, k], contiguous like up
    up: Tensor  # [n, r]
    activation: str
    scaling: float
    mask: Mask | None


def bottleneck(args: Any) -> tuple[Tensor, Tensor]:
    adapter = checked(args)
    if not is_fused(args):
        y, z = OPS["bottleneck"].plain(*args)
        return y, z
    x, r, n = adapter.x, adapter.down.shape[0], adapter.up.shape[0]
    check_outputs(args.residual is None, x, n)
    biases = vector(args.down_bias, r, x, "down_bias"), vector(args.up_bias, n, x, "up_bias")
    y = x.new_empty((*args.x.shape[:-1], n))
    z = x.new_empty((*args.x.shape[:-1], r), dtype=torch.float32)
    residual = x if args.residual is None else matching(args.residual, y, "residual")
    launch_forward(adapter, *biases, residual, y, as_rows(z, "z"))
    return y, z


def bottleneck_backward(args: Any) -> tuple[Tensor, ...]:
    adapter = checked(args)
    x, (r, _), n = adapter.x, adapter.down.shape, adapter.up.shape[0]
    check_outputs(args.adds_dy, x, n)
    check_gradient(args, n, r)
    if not is_fused(args):
        found: tuple[Tensor, ...] = OPS["bottleneck_backward"].plain(*args)
        return found
    dy, z = as_rows(args.dy, "dy"), as_rows(args.z, "z")
    need_dz = args.need_dx or args.need_ddown or args.need_ddown_bias
    value = torch.empty_like(z) if args.need_dup else None
    dz = torch.empty_like(z) if need_dz else None
    dx, ddown, dup = (
        empty_unless(need, t)
        for need, t in ((args.need_dx, args.x), (args.need_ddown, adapter.down), (args.need_dup, adapter.up))
    )
    if value is not None or dz is not None:
        launch_backward(adapter, dy, z, value, dz, args.adds_dy, dx if args.need_dx else None)
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


def is_fused(args: Any) -> bool:
    """The kernels have no layer norm: with one the op runs the reference."""
    return args.norm_weight is None


def launch_forward(
    adapter: Adapter,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor,
    y: Tensor,
    z: Tensor,
    own: OwnRows | None = None,
) -> None:
    """Writes y and z [m, r or more], in the rows of `own`."""
    x, down, up, _, scaling, mask = adapter
    delta = Delta(torch.empty_like(z), up, scaling, Selection())
    tensors = shrink_args(x, down.t()), down_bias, z, pack_mask(mask), _scale(mask)
    rest = delta_args(delta), up_bias, residual, y, own
    _launch(bottleneck_kernel, adapter, own, *tensors, *rest, x.shape[0], up.shape[0], z.shape[1])


def launch_backward(
    adapter: Adapter,
    dy: Tensor,
    z: Tensor,
    value: Tensor | None,
    dz: Tensor | None,
    adds_dy: bool,
    dx: Tensor | None,
    own: OwnRows | None = None,
) -> None:
    """Writes value, dz and dx, those that are not None, in the rows of `own`. dx needs dz."""
    x, down, up, _, scaling, mask = adapter
    delta = Delta(dz, down.t(), 1.0, Selection()) if dz is not None and dx is not None else None
    tensors = shrink_args(dy, up), z, value, dz, pack_mask(mask), _scale(mask), scaling
    rest = delta_args(delta), dy if adds_dy else None, dx, own
    _launch(bottleneck_backward_kernel, adapter, own, *tensors, *rest, *x.shape, z.shape[1])


def _launch(kernel: object, adapter: Adapter, own: OwnRows | None, *args: Any) -> None:
    (rows, _), dtype, rank = adapter.x.shape, adapter.x.dtype, adapter.down.shape[0]
    # Small tiles while large ones would leave multiprocessors idle, and where fp32 sums need the registers.
    few = dtype == torch.float32 or rows <= MANY["BLOCK_M"] * multiprocessors(adapter.x.device)
    tiles = FEW if few else MANY
    constants = {"ACTIVATION": adapter.activation, "DTYPE": triton_dtype(dtype), "QUADS": rank % 4 == 0}
    # fp32 operands are split into parts, which need registers: most with fp16.
    wide = torch.float32 in (adapter.down.dtype, adapter.up.dtype)
    block_k = 64 if not wide else 16 if dtype == torch.float16 and own is not None else 32
    blocks = {"BLOCK_K": block_k, "BLOCK_R": rank_block(rank)}
    blocks["SUM_R"] = min(summed_rank_block(rank, dtype), MAX_SUMMED)
    launch(kernel, (cdiv(rows, tiles["BLOCK_M"]),), *args, config=tiles, **constants, **blocks)


def _scale(mask: Mask | None) -> float:
    return 1.0 if mask is None else mask.scale


def checked(args: Any) -> Adapter:
    """An adapter's operands. Raises RuntimeError where they do not fit."""
    x, down, up = as_rows(args.x, "x"), args.down, args.up
    check_factor(down, x.dtype, "down")
    check_factor(up, x.dtype, "up")
    check(down.numel() > 0, "down", "elements", f"shape {list(down.shape)}")
    check(down.shape[1] == x.shape[1], "x", f"{down.shape[1]} features", x.shape[1])
    check_shape(up, (up.shape[0], down.shape[0]), "up")
    check(args.activation in ACTIVATIONS, "activation", "silu, gelu, gelu_tanh or relu", args.activation)
    for name in ("norm_weight", "norm_bias"):
        vector(getattr(args, name), x.shape[1], x, name)
    check_dropout(args.dropout_p, args.seed)
    mask = None if args.dropout_p == 0 else Mask(args.seed, 0, args.dropout_p)
    return Adapter(x, down.contiguous(), up.contiguous(), args.activation, args.scaling, mask)


def check_outputs(x_is_residual: bool, x: Tensor, n: int) -> None:
    k = x.shape[1]
    check(n == k or not x_is_residual, "up", f"{k} rows like x, the residual, has features", n)


def check_gradient(args: Any, n: int, r: int) -> None:
    """Raises unless dy and z of a backward fit x. `r`: columns of z."""
    check_dtype(args.dy, args.x.dtype, "dy")
    check_shape(args.dy, (*args.x.shape[:-1], n), "dy")
    check_dtype(args.z, torch.float32, "z")
    check_shape(args.z, (*args.x.shape[:-1], r), "z")


def vector(t: Tensor | None, size: int, x: Tensor, name: str) -> Tensor | None:
    """A bias or norm parameter, contiguous. Raises unless it fits."""
    if t is None:
        return None
    check_factor(t, x.dtype, name, dims=1)
    check_shape(t, (size,), name)
    return t.contiguous()
