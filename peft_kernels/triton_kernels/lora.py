"""Linear layers with LoRA adapters: layers that share x, each with any number of adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapters import Adapter, Delta, adapters_of, check_outputs
from .common import check, check_dtype, check_lengths, check_shape, compute_type
from .layers import forward, input_gradient, layers_of
from .linear import as_rows
from .lora_products import over_rows, to_ranks


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
    check(lora_b.dim() == 2, "lora_b", "2 dimensions", lora_b.dim())
    (y,), h = multi_lora_linear(
        x,
        [weight],
        [absmax],
        [absmax2],
        [offset],
        [blocksize],
        [lora_b.shape[0]],
        [bias],
        [lora_a],
        [lora_b],
        [0],
        [scaling],
        [dropout_p],
        seed,
        [0],
        None,
        compute_dtype,
    )
    return y, h


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
    dx, (da,), (db,) = multi_lora_linear_backward(
        [dy],
        x,
        h,
        [weight],
        [absmax],
        [absmax2],
        [offset],
        [blocksize],
        [lora_a],
        [lora_b],
        [0],
        [scaling],
        [dropout_p],
        seed,
        [0],
        None,
        compute_dtype,
        need_dx,
        [need_da],
        [need_db],
    )
    return dx, da, db


def multi_lora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    absmax: Sequence[Tensor | None],
    absmax2: Sequence[Tensor | None],
    offset: Sequence[Tensor | None],
    blocksize: Sequence[int],
    out_features: Sequence[int],
    bias: Sequence[Tensor | None],
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
    rows = as_rows(x, "x")
    rounded = rows.to(compute_type(compute_dtype, x))
    adapters = adapters_of(
        rows, len(weight), lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group
    )
    layers = layers_of(rows, weight, absmax, absmax2, offset, blocksize, out_features, compute_dtype)
    check_outputs(adapters, out_features)
    check(len(bias) == len(layers), "bias", f"{len(layers)} like weight", len(bias))
    h = _empty_ranks(rows, adapters)
    for adapter in adapters:
        to_ranks(rows, adapter.a.t(), h[:, adapter.columns], 1.0, adapter.mask, adapter.served)
    y = []
    for j, of_layer in enumerate(layers):
        own_bias = bias[j]
        if own_bias is not None and own_bias.numel() == 0:
            own_bias = None
        deltas = [
            Delta(h[:, adapter.columns], adapter.b, adapter.scaling, None, adapter.served)
            for adapter in adapters
            if adapter.layer == j
        ]
        out = forward(rounded, of_layer, own_bias, deltas, x.dtype)
        y.append(out.view(*x.shape[:-1], of_layer.n))
    return y, h.view(*x.shape[:-1], h.shape[1])


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
    rows = as_rows(x, "x")
    check(len(dy) == len(weight), "dy", f"{len(weight)} like weight", len(dy))
    check_lengths((need_da, need_db), len(lora_a), "need_da, need_db", "lora_a")
    gradients = [_gradient_rows(d, x) for d in dy]
    out_features = [d.shape[1] for d in gradients]
    adapters = adapters_of(
        rows, len(weight), lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group
    )
    rounded = [d.to(compute_type(compute_dtype, x)) for d in gradients]
    layers = layers_of(rows, weight, absmax, absmax2, offset, blocksize, out_features, compute_dtype)
    check_outputs(adapters, out_features)
    dh = _empty_ranks(rows, adapters)
    check_dtype(h, torch.float32, "h")
    check_shape(h, (*x.shape[:-1], dh.shape[1]), "h")
    h = as_rows(h, "h")
    if need_dx or any(need_da):
        for adapter in adapters:
            d, part = gradients[adapter.layer], dh[:, adapter.columns]
            to_ranks(d, adapter.b, part, adapter.scaling, None, adapter.served)

    dx = x.new_empty(x.shape if need_dx else 0)
    if need_dx:
        deltas = [Delta(dh[:, a.columns], a.a.t(), 1.0, a.mask, a.served) for a in adapters]
        dx = input_gradient(rounded, layers, deltas, x.dtype).view(x.shape) if layers else dx.zero_()
    da, db = [], []
    for adapter, for_a, for_b in zip(adapters, need_da, need_db, strict=True):
        da.append(adapter.a.new_empty(adapter.a.shape if for_a else 0))
        db.append(adapter.b.new_empty(adapter.b.shape if for_b else 0))
        if for_a:
            over_rows(rows, dh[:, adapter.columns], da[-1].t(), 1.0, adapter.mask, adapter.served)
        if for_b:
            d = gradients[adapter.layer]
            over_rows(d, h[:, adapter.columns], db[-1], adapter.scaling, None, adapter.served)
    return dx, da, db


def _empty_ranks(rows: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """For h or dh: the columns of all adapters, side by side."""
    ranks = sum(adapter.rank for adapter in adapters)
    return rows.new_empty((rows.shape[0], ranks), dtype=torch.float32)


def _gradient_rows(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of a layer's output."""
    check_dtype(dy, x.dtype, "dy")
    check(dy.dim() == x.dim(), "dy", f"{x.dim()} dimensions like x", dy.dim())
    check_shape(dy, (*x.shape[:-1], dy.shape[-1]), "dy")
    return as_rows(dy, "dy")
