"""Linear layers of a mixture of experts, with and without adapters, without host synchronisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.code_tables import NESTED_BLOCKSIZE
from ...core.formats import blocksize_of
from ...core.op import Base
from ..core.common import check, check_dtype, check_float, check_shape
from ..core.gemm import Partials, SplitK, new_partials, split_k
from ..core.launch import cdiv, launch, power_of_2, target
from ..core.lora_delta import DeltaArgs, check_factor
from ..linear.linear import BACKWARD, FORWARD, Tiles, checked_bias, steps_of, table_for
from ..linear.linear_kernels import BLOCK_D
from ..lora.lora_gemms import FEW_ROWS, OVER_ROWS, SHRINK, SHRINK_FEW, rank_block
from ..nf4.nf4_groups import dequantize_groups
from ..nf4.nf4_weight import SCALE_CODES, Nf4, Pointers, many_nf4
from .experts_kernels import Factor, Strides, experts_kernel, experts_over_rows_kernel, experts_shrink_kernel

# Fewer entries than for one weight: the host does not know how many rows each expert has.
EXPERTS_FORWARD = [FORWARD[1], FORWARD[2], FORWARD[3]]
EXPERTS_BACKWARD = [BACKWARD[0], BACKWARD[2], BACKWARD[3]]
MAX_ROWS_AMD = 64  # of a tile: a larger one spills on RDNA 4


class Group(NamedTuple):
    """Rows sorted by expert."""

    ends: Tensor  # int32 [experts], contiguous
    rows: int

    @property
    def experts(self) -> int:
        return self.ends.shape[0]

    @property
    def average_rows(self) -> int:
        """Rows per expert if all that can have rows have equally many."""
        return cdiv(self.rows, max(min(self.experts, self.rows), 1))

    def slots(self, block_m: int) -> int:
        """The most tiles of `block_m` rows of one expert that there can be; rows of no expert count too."""
        most = min(self.experts + 1, self.rows)
        return most + (self.rows - most) // block_m

    @property
    def sizes(self) -> tuple[int, int]:
        return self.rows, self.experts

    @property
    def constexpr_experts(self) -> int:
        return power_of_2(self.experts + 1)


class Weights(NamedTuple):
    """The base weights of all experts. Dense ones have the activations' dtype and layout 0."""

    of_all: Nf4
    strides: Strides


class Adapters(NamedTuple):
    """What the experts' adapters add to a GEMM: scale * u v^T."""

    u: Tensor  # fp32 [rows, rank], contiguous
    v: Tensor  # [experts, features, rank]
    scale: float

    @property
    def args(self) -> DeltaArgs:
        u, v = self.u, self.v
        return DeltaArgs(u, v, u.stride(0), v.stride(1), v.stride(2), v.shape[2], self.scale)


def weights_of(base: Base, x: Tensor, group: Group, n: int, k: int) -> Weights:
    """The weights [experts, n, k] for activations x. Raises RuntimeError when their parts do not fit."""
    experts, numel = group.experts, n * k
    if base.absmax is None:
        check_dtype(base.weight, x.dtype, "weight")
        check_shape(base.weight, (experts, n, k), "weight")
        return Weights(Nf4(Pointers(base.weight.contiguous()), 0), Strides(numel))
    weights = many_nf4(base, n, k, experts)
    if not weights.is_fused:
        dense = x.new_empty(experts, n, k)
        dequantize_groups(weights, k, range(n), range(k), dense)
        return Weights(Nf4(Pointers(dense), 0), Strides(numel))
    blocks, groups = cdiv(numel, blocksize_of(base.layout)), 0
    if base.offset is not None:
        groups = cdiv(blocks, NESTED_BLOCKSIZE)
    elif base.absmax2 is not None and base.absmax2.numel() > SCALE_CODES:
        groups = SCALE_CODES
    return Weights(weights, Strides((numel + 1) // 2, blocks, groups))


def grouped_gemm(
    x: Tensor,
    group: Group,
    weights: Weights,
    features: int,
    backward: bool,
    bias: Tensor | None = None,
    adapters: Adapters | None = None,
) -> Tensor:
    """x [rows, depth] times the weight [depth, features] of each row's expert if `backward`, else times its
    transposed weight [features, depth], plus its bias and adapter. Contiguous."""
    depth, weight = x.shape[1], weights.of_all
    out = x.new_empty(group.rows, features)
    if out.numel() == 0:
        return out
    tiles = tiles_of(x.dtype, backward, group.average_rows)
    block_m, block_f = tiles.config["BLOCK_M"], tiles.config["BLOCK_F"]
    run, unit = 0, BLOCK_D.value
    if weight.pointers.absmax is not None:
        run, unit = steps_of(weight, features, depth, backward, x.dtype, tiles)
    split, parts = _split_k(group.slots(block_m) * cdiv(features, block_f), depth, unit, block_m * block_f, x)
    strides = weights.strides._replace(bias=features, v=0 if adapters is None else adapters.v.stride(0))
    delta = None if adapters is None else adapters.args
    grid = group.slots(block_m) * cdiv(features, block_f), split.splits
    tensors = x, group.ends, weight.pointers, bias, delta, strides, out, parts
    constants = {"LAYOUT": weight.layout, "BACKWARD": backward, "RUN": run, "UNIT": unit}
    args = *tensors, *group.sizes, features, depth, split.units
    launch(experts_kernel, grid, *args, config=tiles.config, EXPERTS=group.constexpr_experts, **constants)
    return out


def tiles_of(dtype: torch.dtype, backward: bool, rows: int) -> Tiles:
    """Tiles for experts of about `rows` rows."""
    if dtype == torch.float32:
        return table_for(dtype, backward)[-1]
    table = EXPERTS_BACKWARD if backward else EXPERTS_FORWARD
    if target() == "hip":
        table = [tiles for tiles in table if tiles.config["BLOCK_M"] <= MAX_ROWS_AMD]
    return next((tiles for tiles in table if rows <= tiles.rows), table[-1])


def _split_k(programs: int, depth: int, unit: int, tile: int, x: Tensor) -> tuple[SplitK, Partials | None]:
    split = split_k(programs, depth, unit, x.device)
    return split, None if split.splits == 1 else new_partials(programs * split.splits, tile, x.device)


def shrink_experts(x: Tensor, group: Group, factor: Tensor, scale: float) -> Tensor:
    """scale x [rows, features] factor [experts, features, rank]: fp32 [rows, rank], 0 in rows of no
    expert."""
    features, rank = factor.shape[1:]
    out = x.new_empty((group.rows, rank), dtype=torch.float32)
    if out.numel() == 0:
        return out
    config = SHRINK_FEW if group.average_rows <= FEW_ROWS else SHRINK
    block_m, block_r = config["BLOCK_M"], rank_block(rank)
    unit, programs = _unit(x), group.slots(block_m) * cdiv(rank, block_r)
    split, parts = _split_k(programs, features, unit, block_m * block_r, x)
    sizes = *group.sizes, features, rank, scale, split.units
    args = x, group.ends, Factor(factor, *factor.stride()), out, parts, *sizes
    constants = {"EXPERTS": group.constexpr_experts, "BLOCK_F": unit, "BLOCK_R": block_r}
    launch(experts_shrink_kernel, (programs, split.splits), *args, config=config, **constants)
    return out


def sum_over_rows(x: Tensor, group: Group, factor: Tensor, out: Tensor, scale: float) -> None:
    """out [experts, features, rank] = scale x [rows, features]^T factor [rows, rank], over its rows."""
    if out.numel() == 0:
        return
    features, rank = out.shape[1:]
    block_r = rank_block(rank)
    programs = group.experts * cdiv(features, OVER_ROWS["BLOCK_F"]) * cdiv(rank, block_r)
    args = x, group.ends, factor, Factor(out, *out.stride()), *group.sizes, features, rank, scale
    constants = {"BLOCK_M": _unit(x), "BLOCK_R": block_r}
    launch(experts_over_rows_kernel, (programs,), *args, config=OVER_ROWS, **constants)


def _unit(x: Tensor) -> int:
    """Elements that an adapter's GEMM sums per step."""
    return 32 if x.dtype == torch.float32 else 64


def experts_linear(args: Any) -> Tensor:
    x, ends, base, out_features, bias = args
    x, group = _rows(x, "x", ends)
    weights = weights_of(base, x, group, out_features, x.shape[1])
    return grouped_gemm(x, group, weights, out_features, False, _bias(bias, x, group, out_features))


def experts_linear_dx(args: Any) -> Tensor:
    dy, ends, base, in_features = args
    dy, group = _rows(dy, "dy", ends)
    weights = weights_of(base, dy, group, dy.shape[1], in_features)
    return grouped_gemm(dy, group, weights, in_features, True)


def experts_lora_linear(args: Any) -> tuple[Tensor, Tensor]:
    x, group = _rows(args.x, "x", args.ends)
    a, b = _adapters(args, x, group)
    n, k = b.shape[1], x.shape[1]
    weights, bias = weights_of(args.base, x, group, n, k), _bias(args.bias, x, group, n)
    h = shrink_experts(x, group, a.mT, 1.0)
    return grouped_gemm(x, group, weights, n, False, bias, Adapters(h, b, args.scaling)), h


def experts_lora_linear_backward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, group = _rows(args.x, "x", args.ends)
    a, b = _adapters(args, x, group)
    n, rank, k = b.shape[1], *a.shape[1:]
    check_dtype(args.dy, x.dtype, "dy")
    check_shape(args.dy, (group.rows, n), "dy")
    check_dtype(args.h, torch.float32, "h")
    check_shape(args.h, (group.rows, rank), "h")
    dy, h = args.dy.contiguous(), args.h.contiguous()
    weights = weights_of(args.base, x, group, n, k)
    dx = x.new_empty(0)
    da, db = a.new_empty(a.shape if args.need_da else 0), b.new_empty(b.shape if args.need_db else 0)
    if args.need_dx or args.need_da:
        dh = shrink_experts(dy, group, b, args.scaling)
        if args.need_dx:
            dx = grouped_gemm(dy, group, weights, k, True, None, Adapters(dh, a.mT, 1.0))
        if args.need_da:
            sum_over_rows(x, group, dh, da.mT, 1.0)
    if args.need_db:
        sum_over_rows(dy, group, h, db, args.scaling)
    return dx, da, db


def _rows(t: Tensor, name: str, ends: Tensor) -> tuple[Tensor, Group]:
    """Activations, contiguous, and their experts."""
    check_float(t, name)
    check(t.dim() == 2, name, "2 dimensions", t.dim())
    check_dtype(ends, torch.int32, "ends")
    check(ends.dim() == 1, "ends", "1 dimension", ends.dim())
    return t.contiguous(), Group(ends.contiguous(), t.shape[0])


def _bias(bias: Tensor | None, x: Tensor, group: Group, features: int) -> Tensor | None:
    return None if bias is None else checked_bias(bias, (group.experts, features), x.dtype)


def _adapters(args: Any, x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    a, b = args.lora_a, args.lora_b
    for name, factor in (("lora_a", a), ("lora_b", b)):
        check_factor(factor, x.dtype, name, 3)
    check_shape(a, (group.experts, a.shape[1], x.shape[1]), "lora_a")
    check_shape(b, (group.experts, b.shape[1], a.shape[1]), "lora_b")
    return a.contiguous(), b.contiguous()
