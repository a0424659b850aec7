"""Linear layers with LoRA adapters: layers that share x, each with any number of adapters.

A layer has a frozen weight, dense or packed: y = x W^T + bias, dx = dY W, plus the adapters' deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.common import check, check_dtype, check_lengths, check_shape, compute_type
from ..core.lora_delta import Adapter, Delta, adapters_of, check_outputs
from ..linear.linear import as_rows, base_gemm, checked_bias, fused_gemm
from ..nf4.nf4_weight import Nf4, nf4
from .lora_gemms import Gemm, over_rows, shrink, sum_with_deltas


class Layer(NamedTuple):
    weight: Nf4 | Tensor  # dense: in the base GEMM's dtype, contiguous
    n: int  # outputs
    k: int  # inputs


def layers_of(args: Any, x: Tensor, out_features: Sequence[int]) -> list[Layer]:
    """The base weights of an op on x [m, k]. Raises RuntimeError when they do not fit."""
    check_lengths((out_features,), len(args.bases), "out_features", "weight")
    layers, k = [], x.shape[1]
    for base, n in zip(args.bases, out_features, strict=True):
        if base.absmax is None:
            check_dtype(base.weight, compute_type(args.compute_dtype, x), "weight")
            check_shape(base.weight, (n, k), "weight")
            layers.append(Layer(base.weight.contiguous(), n, k))
        else:
            layers.append(Layer(nf4(base, n, k), n, k))
    return layers


def multi_lora_linear(args: Any) -> tuple[list[Tensor], Tensor]:
    x, bias, out_features = args.x, args.bias, args.out_features
    rows = as_rows(x, "x")
    rounded = rows.to(compute_type(args.compute_dtype, x))
    adapters = adapters_of(args, rows)
    layers = layers_of(args, rows, out_features)
    check_outputs(adapters, out_features)
    check(len(bias) == len(layers), "bias", f"{len(layers)} like weight", len(bias))
    h = _empty_ranks(rows, adapters)
    shrink([Gemm(rows, a.a.t(), h[:, a.columns], 1.0, a.selection) for a in adapters])
    y = []
    for j, of_layer in enumerate(layers):
        layer_bias = bias[j]
        if layer_bias is not None and layer_bias.numel() == 0:
            layer_bias = None
        own = [adapter for adapter in adapters if adapter.layer == j]
        deltas = [Delta(h[:, a.columns], a.b, a.scaling, a.selection.without_mask) for a in own]
        out = _forward(rounded, of_layer, layer_bias, deltas, x.dtype)
        y.append(out.view(*x.shape[:-1], of_layer.n))
    return y, h.view(*x.shape[:-1], h.shape[1])


def multi_lora_linear_backward(args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, h, dy = args.x, args.h, args.dy
    need_dx, need_da, need_db = args.need_dx, args.need_da, args.need_db
    rows = as_rows(x, "x")
    layers_count = len(args.bases)
    check(len(dy) == layers_count, "dy", f"{layers_count} like weight", len(dy))
    check_lengths((need_da, need_db), len(args.lora_a), "need_da, need_db", "lora_a")
    gradients = [_gradient_rows(d, x) for d in dy]
    out_features = [d.shape[1] for d in gradients]
    adapters = adapters_of(args, rows)
    rounded = [d.to(compute_type(args.compute_dtype, x)) for d in gradients]
    layers = layers_of(args, rows, out_features)
    check_outputs(adapters, out_features)
    dh = _empty_ranks(rows, adapters)
    check_dtype(h, torch.float32, "h")
    check_shape(h, (*x.shape[:-1], dh.shape[1]), "h")
    h = as_rows(h, "h")
    if need_dx or any(need_da):
        shrink(
            [
                Gemm(gradients[a.layer], a.b, dh[:, a.columns], a.scaling, a.selection.without_mask)
                for a in adapters
            ]
        )

    dx = x.new_empty(x.shape if need_dx else 0)
    if need_dx:
        deltas = [Delta(dh[:, a.columns], a.a.t(), 1.0, a.selection) for a in adapters]
        dx = _input_gradient(rounded, layers, deltas, x.dtype).view(x.shape) if layers else dx.zero_()
    da, db, sums = [], [], []
    for a, for_a, for_b in zip(adapters, need_da, need_db, strict=True):
        da.append(a.a.new_empty(a.a.shape if for_a else 0))
        db.append(a.b.new_empty(a.b.shape if for_b else 0))
        if for_a:
            sums.append(Gemm(rows, dh[:, a.columns], da[-1].t(), 1.0, a.selection))
        if for_b:
            selection = a.selection.without_mask
            sums.append(Gemm(gradients[a.layer], h[:, a.columns], db[-1], a.scaling, selection))
    over_rows(sums)
    return dx, da, db


def lora_linear(args: Any) -> tuple[Tensor, Tensor]:
    """`multi_lora_linear` with one layer and one adapter."""
    b = args.lora_b
    check(b.dim() == 2, "lora_b", "2 dimensions", b.dim())
    (y,), h = multi_lora_linear(_one_of_many(args, out_features=[b.shape[0]], bias=[args.bias]))
    return y, h


def lora_linear_backward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`multi_lora_linear_backward` with one layer and one adapter."""
    needs = {"need_dx": args.need_dx, "need_da": [args.need_da], "need_db": [args.need_db]}
    many = _one_of_many(args, dy=[args.dy], h=args.h, **needs)
    dx, (da,), (db,) = multi_lora_linear_backward(many)
    return dx, da, db


def _one_of_many(args: Any, **others: Any) -> Any:
    """The arguments of a one-layer op as those of the op for several layers."""
    lists = {"bases": [args.base], "lora_a": [args.lora_a], "lora_b": [args.lora_b], "layer": [0]}
    lists |= {"scaling": [args.scaling], "dropout_p": [args.dropout_p], "group": [0]}
    same = {"x": args.x, "seed": args.seed, "row_group": None, "compute_dtype": args.compute_dtype}
    return SimpleNamespace(**lists, **same, **others)


def _forward(
    x: Tensor, layer: Layer, bias: Tensor | None, deltas: Sequence[Delta], dtype: torch.dtype
) -> Tensor:
    """y [m, n] of dtype `dtype`, contiguous. x [m, k] is in the base GEMM's dtype."""
    weight, n, _ = layer
    if bias is not None:
        bias = checked_bias(bias, (n,), x.dtype if bias.dtype == x.dtype else dtype)
        bias = bias if bias.dtype == x.dtype else bias.float()
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        if x.dtype == dtype and _joins(deltas):
            fused = fused_gemm(x, weight, n, False, bias, deltas[0])
            if fused is not None:
                return fused
        y = base_gemm(x, weight, n, False, bias)
    return sum_with_deltas([y.to(dtype)], deltas)


def _input_gradient(
    dy: Sequence[Tensor], layers: Sequence[Layer], deltas: Sequence[Delta], dtype: torch.dtype
) -> Tensor:
    """dx [m, k] of dtype `dtype`. dy: [m, n] of each layer, at least one, in the base GEMM's dtype."""
    weight, _, k = layers[0]
    if dy[0].dtype == dtype and len(layers) == 1 and isinstance(weight, Nf4) and _joins(deltas):
        fused = fused_gemm(dy[0], weight, k, True, None, deltas[0])
        if fused is not None:
            return fused
    terms = [
        (torch.mm(d, weight) if isinstance(weight, Tensor) else base_gemm(d, weight, k, True)).to(dtype)
        for d, (weight, _, k) in zip(dy, layers, strict=True)
    ]
    return sum_with_deltas(terms, deltas)


def _joins(deltas: Sequence[Delta]) -> bool:
    """Whether the base GEMM's kernel can add the deltas: only a single one that serves every row. In other
    rows zeros would be multiplied by the adapter, which may hold Inf."""
    return len(deltas) == 1 and deltas[0].selection.rows is None


def _empty_ranks(rows: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Uninitialised h or dh: the columns of all adapters, side by side."""
    ranks = sum(adapter.rank for adapter in adapters)
    return rows.new_empty((rows.shape[0], ranks), dtype=torch.float32)


def _gradient_rows(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of a layer's output as rows. Raises unless it fits x."""
    check_dtype(dy, x.dtype, "dy")
    check(dy.dim() == x.dim(), "dy", f"{x.dim()} dimensions like x", dy.dim())
    check_shape(dy, (*x.shape[:-1], dy.shape[-1]), "dy")
    return as_rows(dy, "dy")
