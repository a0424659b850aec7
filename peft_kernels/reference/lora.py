"""Linear layers with LoRA (Hu et al. 2021), one adapter or many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulator_dtype, dense_weight, rows
from .dropout import dropped


def lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    shape, compute = (lora_b.shape[0], lora_a.shape[1]), compute_dtype or x.dtype
    weight = dense_weight(weight, absmax, absmax2, offset, blocksize, shape, compute)
    acc = accumulator_dtype(x.dtype)
    h = dropped(x.to(acc), dropout_p, seed) @ lora_a.to(acc).t()
    base = F.linear(x.to(compute), weight, None if bias is None else bias.to(compute))
    return (base.to(acc) + scaling * (h @ lora_b.to(acc).t())).to(x.dtype), h


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    compute_dtype: torch.dtype | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator_dtype(x.dtype)
    dy2, x2, h2 = rows(dy), rows(x), rows(h)
    dy_acc = dy2.to(acc)
    dh = scaling * (dy_acc @ lora_b.to(acc))
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if need_dx:
        shape, compute = (lora_b.shape[0], lora_a.shape[1]), compute_dtype or x.dtype
        weight = dense_weight(weight, absmax, absmax2, offset, blocksize, shape, compute)
        delta = dropped(dh @ lora_a.to(acc), dropout_p, seed)
        dx = ((dy2.to(compute) @ weight).to(acc) + delta).to(x.dtype).view(x.shape).contiguous()
    if need_da:
        da = (dh.t() @ dropped(x2.to(acc), dropout_p, seed)).to(lora_a.dtype)
    if need_db:
        db = (scaling * (dy_acc.t() @ h2)).to(lora_b.dtype)
    return dx, da, db


def multi_lora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    absmax: Sequence[Tensor | None],
    absmax2: Sequence[Tensor | None],
    offset: Sequence[Tensor | None],
    blocksize: Sequence[int],
    out_features: Sequence[int],
    bias: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    layer: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    group: Sequence[int],
    row_group: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    acc, compute = accumulator_dtype(x.dtype), compute_dtype or x.dtype
    x2 = rows(x)
    parts = [
        _of_group(dropped(x2.to(acc), p, seed, i) @ a.to(acc).t(), group, i, row_group)
        for i, (a, p) in enumerate(zip(lora_a, dropout_p, strict=True))
    ]
    y = []
    for j, (w, n, b) in enumerate(zip(weight, out_features, bias, strict=True)):
        w = dense_weight(w, absmax[j], absmax2[j], offset[j], blocksize[j], (n, x.shape[-1]), compute)
        out = F.linear(x2.to(compute), w, b.to(compute) if b.numel() else None).to(acc)
        for i, part in enumerate(parts):
            if layer[i] == j:
                out = out + scaling[i] * (part @ lora_b[i].to(acc).t())
        y.append(out.to(x.dtype).reshape(*x.shape[:-1], n))
    h = torch.cat(parts, 1) if parts else x2.new_empty((x2.shape[0], 0), dtype=acc)
    return y, h.reshape(*x.shape[:-1], h.shape[1])


def multi_lora_linear_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weight: Sequence[Tensor],
    absmax: Sequence[Tensor | None],
    absmax2: Sequence[Tensor | None],
    offset: Sequence[Tensor | None],
    blocksize: Sequence[int],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    layer: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    group: Sequence[int],
    row_group: Tensor | None,
    compute_dtype: torch.dtype | None,
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    acc, compute = accumulator_dtype(x.dtype), compute_dtype or x.dtype
    x2, dy2 = rows(x), [rows(d) for d in dy]
    total = x2.new_zeros(x2.shape, dtype=acc)
    if need_dx:
        for j, d in enumerate(dy2):
            shape = (d.shape[1], x.shape[-1])
            w = dense_weight(weight[j], absmax[j], absmax2[j], offset[j], blocksize[j], shape, compute)
            total = total + (d.to(compute) @ w).to(acc)
    da, db = [], []
    h_parts = rows(h).split([a.shape[0] for a in lora_a], 1)
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        d, p = dy2[layer[i]].to(acc), dropout_p[i]
        dh = _of_group(scaling[i] * (d @ b.to(acc)), group, i, row_group)
        da.append((dh.t() @ dropped(x2.to(acc), p, seed, i)).to(a.dtype) if need_da[i] else a.new_empty(0))
        db.append((scaling[i] * (d.t() @ h_parts[i])).to(b.dtype) if need_db[i] else b.new_empty(0))
        if need_dx:
            total = total + dropped(dh @ a.to(acc), p, seed, i)
    return total.to(x.dtype).view(x.shape) if need_dx else x.new_empty(0), da, db


def _of_group(values: Tensor, group: Sequence[int], adapter: int, row_group: Tensor | None) -> Tensor:
    """`values` by row, zero in rows of another group than the adapter's."""
    if row_group is None:
        return values
    return values * (row_group == group[adapter])[:, None]
