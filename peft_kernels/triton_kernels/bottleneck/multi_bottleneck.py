"""Bottleneck adapters that serve different rows: rows are sorted by adapter on the device, and each adapter's
kernel takes its own. The host never waits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...core import registry
from ...core.op import OPS
from ...ops.common import empty_unless
from ..core.common import check, check_dtype, check_lengths, check_shape, matching
from ..core.lora_delta import RowGroup, Selection
from ..linear.linear import as_rows
from ..lora.lora_gemms import Gemm, over_rows
from . import bottleneck as single
from .bottleneck_kernels import own_rows

OF_EACH = ("norm_weight", "norm_bias", "norm_eps", "down", "up", "activation", "scaling", "dropout_p", "seed")
"""The arguments of both directions that have an item per adapter."""
SUMS_AT_ONCE = 2
"""Sums over rows in a launch: four with rows of their own spill registers in fp32 (sm80)."""


def multi_bottleneck(args: Any) -> tuple[Any, ...]:
    x = as_rows(args.x, "x")
    y_like = args.x if args.residual is None else args.residual
    adapters, ranks = _checked(args, x, y_like.shape[-1], ("down_bias", "up_bias"))
    groups = _row_group(args.row_group, x)
    residual = matching(y_like, x.new_empty((*args.x.shape[:-1], y_like.shape[-1])), "residual")
    if not _is_fused(args):
        return _composed("multi_bottleneck", args)
    y = residual.clone()  # the rows of no adapter; the others are written anew
    z = x.new_zeros((*args.x.shape[:-1], ranks), dtype=torch.float32)
    order = _sorted(groups, len(adapters))
    for i, adapter in enumerate(adapters):
        down_bias = single.vector(args.down_bias[i], adapter.down.shape[0], x, "down_bias")
        up_bias = single.vector(args.up_bias[i], adapter.up.shape[0], x, "up_bias")
        rest = residual, y, as_rows(z, "z"), own_rows(*order, i)
        single.launch_forward(adapter, down_bias, up_bias, *rest)
    return y, z


def multi_bottleneck_backward(args: Any) -> tuple[Any, ...]:
    x, n = as_rows(args.x, "x"), args.dy.shape[-1]
    needs = ("need_dnorm", "need_ddown", "need_ddown_bias", "need_dup", "need_dup_bias")
    adapters, ranks = _checked(args, x, n, needs)
    groups = _row_group(args.row_group, x)
    single.check_outputs(args.adds_dy, x, n)
    single.check_gradient(args, n, ranks)
    if not _is_fused(args):
        return _composed("multi_bottleneck_backward", args)
    dy, z = as_rows(args.dy, "dy"), as_rows(args.z, "z")
    value: Any = torch.empty_like(z) if any(args.need_dup) else None
    need_dz = any((args.need_dx, *args.need_ddown, *args.need_ddown_bias))
    dz: Any = torch.empty_like(z) if need_dz else None
    dx = None
    if args.need_dx:
        dx = (dy.clone() if args.adds_dy else torch.zeros_like(x)).view(args.x.shape)
    if value is not None or dz is not None:
        order = _sorted(groups, len(adapters))
        for i, adapter in enumerate(adapters):
            single.launch_backward(adapter, dy, z, value, dz, args.adds_dy, dx, own_rows(*order, i))
    ddown = [empty_unless(need, one.down) for one, need in zip(adapters, args.need_ddown, strict=True)]
    dup = [empty_unless(need, one.up) for one, need in zip(adapters, args.need_dup, strict=True)]
    sums = []
    for i, adapter in enumerate(adapters):
        mine, columns = Selection(rows=RowGroup(groups, i)), slice(adapter.down.shape[0])
        if args.need_ddown[i]:
            sums.append(Gemm(x, dz[:, columns], ddown[i].t(), 1.0, mine))
        if args.need_dup[i]:
            sums.append(Gemm(dy, value[:, columns], dup[i], adapter.scaling, mine))
    for begin in range(0, len(sums), SUMS_AT_ONCE):
        over_rows(sums[begin : begin + SUMS_AT_ONCE])

    of_ranks = [(z if dz is None else dz)[:, : one.down.shape[0]] for one in adapters]
    return (
        args.x.new_empty(0) if dx is None else dx,
        [x.new_empty(0) for _ in adapters],
        [z.new_empty(0) for _ in adapters],
        ddown,
        _column_sums(groups, of_ranks, args.need_ddown_bias, [1.0] * len(adapters)),
        dup,
        _column_sums(groups, [dy] * len(adapters), args.need_dup_bias, args.scaling),
    )


def _column_sums(
    groups: Tensor, of: Sequence[Tensor], need: Sequence[bool], scale: Sequence[float]
) -> list[Tensor]:
    """Of each adapter's rows, in fp32."""
    found = []
    for i, t in enumerate(of):
        mine = torch.where((groups == i)[:, None], t, 0) if need[i] else t.new_empty((0, 0))
        found.append(scale[i] * mine.sum(0, dtype=torch.float32))
    return found


def _is_fused(args: Any) -> bool:
    return not any(weight is not None for weight in args.norm_weight)


def _composed(op: str, args: Any) -> tuple[Any, ...]:
    """The op by those on single adapters, for which the host waits."""
    found: tuple[Any, ...] = OPS[op].reference(getattr(torch.ops, f"{registry.NAMESPACE}_triton"), args)
    return found


def _checked(args: Any, x: Tensor, n: int, others: Sequence[str]) -> tuple[list[single.Adapter], int]:
    """The adapters, and the ranks of the widest. `others`: further lists of the op. Raises RuntimeError where
    they do not fit."""
    names = (*OF_EACH, *others)
    check_lengths([getattr(args, name) for name in names], len(args.down), ", ".join(names), "down")
    adapters = []
    for i in range(len(args.down)):
        adapters.append(single.checked(SimpleNamespace(x=x, **{k: getattr(args, k)[i] for k in OF_EACH})))
        check(adapters[i].up.shape[0] == n, "up", f"shape ({n}, r)", list(adapters[i].up.shape))
    return adapters, max((one.down.shape[0] for one in adapters), default=0)


def _row_group(row_group: Tensor, x: Tensor) -> Tensor:
    """The adapter of each row, int64 and contiguous; other numbers mean none."""
    if row_group.dtype != torch.int32:
        check_dtype(row_group, torch.int64, "row_group")
    check_shape(row_group, x.shape[:1], "row_group")
    return row_group.long().contiguous()


def _sorted(groups: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """The rows sorted by adapter, and where those of each begin. The last number: where those of the last
    end."""
    ascending, order = groups.sort(stable=True)
    firsts = torch.arange(adapters + 1, device=groups.device)
    return order.int(), torch.searchsorted(ascending, firsts, out_int32=True)
