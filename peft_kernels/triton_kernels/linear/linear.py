"""Linear layers with a frozen packed weight: y = x W^T + bias and dx = dY W."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.common import check, check_dtype, check_float, check_shape
from ..core.dropout import mask_args
from ..core.gemm import new_partials, split_k
from ..core.launch import Config, cdiv, config, launch, target
from ..core.lora_delta import Delta, delta_args
from ..nf4.nf4_weight import RUNS, SHORT_RUN, Nf4, nf4
from .linear_kernels import BLOCK_D, linear_kernel
from .linear_pieces import backward_by_pieces, forward_by_pieces

RUN = RUNS[0]  # weights per step


class Tiles(NamedTuple):
    """Tiles for up to `rows` rows of x or dy."""

    rows: int
    groups: int  # most runs of weights that a program reads per step
    config: Config


# Up to 64 rows one tile holds them all, and each weight is decoded once. Few rows are bound by memory:
# several runs per step keep loads in flight. Many rows take a longer tile, which reads x less often. Beyond
# the last entry the weight is dequantised piece by piece for torch's GEMM.
FORWARD = [
    Tiles(8, 2, config(8, 5, BLOCK_M=8, BLOCK_F=64)),
    Tiles(16, 4, config(4, 3, BLOCK_M=16, BLOCK_F=64)),
    Tiles(32, 2, config(4, 3, BLOCK_M=32, BLOCK_F=64)),
    Tiles(256, 1, config(8, 3, BLOCK_M=64, BLOCK_F=128)),
]
# Beyond 64 rows a tile of 128 decodes each weight half as often as one of 64 would.
BACKWARD = [
    Tiles(16, 1, config(4, 3, BLOCK_M=16, BLOCK_F=64)),
    Tiles(32, 1, config(4, 3, BLOCK_M=32, BLOCK_F=64)),
    Tiles(64, 1, config(8, 2, BLOCK_M=64, BLOCK_F=64)),
    Tiles(256, 1, config(8, 3, BLOCK_M=128, BLOCK_F=128)),
]
# fp32 does not use tensor cores, and torch's GEMMs are faster from a few rows on.
FORWARD_F32 = [Tiles(16, 1, config(4, 1, BLOCK_M=16, BLOCK_F=32))]
BACKWARD_F32 = [Tiles(16, 1, config(8, 2, BLOCK_M=16, BLOCK_F=32))]


def tiles_for(table: list[Tiles], rows: int) -> Tiles | None:
    least = 16 if target() == "hip" else 8  # columns of a matrix instruction
    return next((t for t in table if rows <= t.rows and least <= t.config["BLOCK_M"]), None)


def table_for(dtype: torch.dtype, backward: bool) -> list[Tiles]:
    if dtype == torch.float32:
        return BACKWARD_F32 if backward else FORWARD_F32
    return BACKWARD if backward else FORWARD


def fused_gemm(
    x: Tensor,
    weight: Nf4,
    features: int,
    backward: bool,
    bias: Tensor | None = None,
    delta: Delta | None = None,
) -> Tensor | None:
    """x [m, depth] times the weight [depth, features] if `backward`, else times the transposed weight
    [features, depth], plus bias and delta. Contiguous. None without a kernel for so many
    rows, or for the format."""
    m, depth = x.shape
    tiles = tiles_for(table_for(x.dtype, backward), m) if weight.is_fused else None
    if tiles is None:
        return None
    out = x.new_empty(m, features)
    if out.numel() == 0:
        return out
    run, unit = steps_of(weight, features, depth, backward, x.dtype, tiles)
    programs = cdiv(m, tiles.config["BLOCK_M"]) * cdiv(features, tiles.config["BLOCK_F"])
    split = split_k(programs, depth, unit, x.device)
    tile = tiles.config["BLOCK_M"] * tiles.config["BLOCK_F"]
    parts = None if split.splits == 1 else new_partials(programs * split.splits, tile, x.device)
    tensors = x, weight.pointers, bias, delta_args(delta), out, parts
    sizes = m, features, depth, split.units
    args = *tensors, *sizes, *mask_args(None if delta is None else delta.selection.mask)
    grid = programs, split.splits
    constants = {"LAYOUT": weight.layout, "BACKWARD": backward, "RUN": run, "UNIT": unit}
    launch(linear_kernel, grid, *args, config=tiles.config, **constants)
    return out


def steps_of(
    weight: Nf4, features: int, depth: int, backward: bool, dtype: torch.dtype, tiles: Tiles
) -> tuple[int, int]:
    """RUN and UNIT of `weight_tile`."""
    run = run_length(weight, features if backward else depth, dtype)
    if run is None:
        return 0, BLOCK_D.value
    if backward or run == SHORT_RUN:
        return run, RUN // 2 if dtype == torch.float32 else RUN
    return run, math.gcd(depth // run, tiles.groups) * run


def run_length(weight: Nf4, k: int, dtype: torch.dtype) -> int | None:
    """Length of the runs that rows of the weight are made of: they share an absmax and fill whole bytes. None
    if rows are not made of such runs."""
    for run in weight.runs:
        if k % run == 0 and weight.blocksize % run == 0 and (run < RUN or dtype != torch.float32):
            return run
    return None


def base_gemm(x: Tensor, weight: Nf4, features: int, backward: bool, bias: Tensor | None = None) -> Tensor:
    """`fused_gemm` without a delta, for any number of rows."""
    out = fused_gemm(x, weight, features, backward, bias)
    if out is not None:
        return out
    return (
        backward_by_pieces(x, weight, features) if backward else forward_by_pieces(x, weight, features, bias)
    )


def nf4_linear(args: Any) -> Tensor:
    x, base, out_features, bias = args
    rows = as_rows(x, "x")
    weight = nf4(base, out_features, rows.shape[1])
    if bias is not None:
        bias = checked_bias(bias, (out_features,), x.dtype)
    return base_gemm(rows, weight, out_features, False, bias).view(*x.shape[:-1], out_features)


def nf4_linear_dx(args: Any) -> Tensor:
    dy, base, in_features = args
    rows = as_rows(dy, "dy")
    weight = nf4(base, rows.shape[1], in_features)
    return base_gemm(rows, weight, in_features, True).view(*dy.shape[:-1], in_features)


def as_rows(t: Tensor, name: str) -> Tensor:
    """t as rows [m, features], contiguous."""
    check_float(t, name)
    check(t.dim() >= 1, name, "at least 1 dimension", t.dim())
    return t.contiguous().view(math.prod(t.shape[:-1]), t.shape[-1])


def checked_bias(bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The bias, contiguous. Raises unless it fits."""
    check_float(bias, "bias")
    if bias.dtype != torch.float32:
        check_dtype(bias, dtype, "bias")
    check_shape(bias, shape, "bias")
    return bias.contiguous()
