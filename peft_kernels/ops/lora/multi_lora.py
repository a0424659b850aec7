"""Several linear layers on one x, each with any number of adapters, which may serve groups of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import and_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import dispatch, flops
from ...core.op import Op, columns
from ...core.wrong_types import names_wrong_types
from .. import arguments
from ..arguments import Weight
from ..common import accumulator_dtype, empty_h, empty_unless, rows, weight_grad
from ..nf4 import dense_weight
from ..sums import bias_grad
from .dropout import apply_dropout, new_seed
from .lora import check_adapter


class MultiLoraLinear(Op):
    """Adapter i belongs to layer[i], draws its dropout mask from stream i of the seed and, with row_group
    (rows,), serves only rows whose group is group[i]. The bias of a layer without one has no elements. h
    holds x A^T of all adapters side by side, zero in rows that an adapter does not serve. compute_dtype as in
    `LoraLinear`."""

    name = "multi_lora_linear"
    schema = (
        "(Tensor x, $bases, SymInt[] out_features, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, "
        "int[] layer, float[] scaling, float[] dropout_p, Tensor? seed, int[] group, Tensor? row_group, "
        "ScalarType? compute_dtype) -> (Tensor[] y, Tensor h)"
    )

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[list[Tensor], Tensor]:
        x = args.x
        acc, compute = accumulator_dtype(x.dtype), args.compute_dtype or x.dtype
        x2 = rows(x)
        parts = [
            _in_served_rows(args, i, apply_dropout(x2.to(acc), p, args.seed, i) @ a.to(acc).t())
            for i, (a, p) in enumerate(zip(args.lora_a, args.dropout_p, strict=True))
        ]
        y = []
        for j, (base, n, b) in enumerate(zip(args.bases, args.out_features, args.bias, strict=True)):
            w = dense_weight(base, (n, x.shape[-1]), compute)
            out = F.linear(x2.to(compute), w, b.to(compute) if b.numel() else None).to(acc)
            for i, part in enumerate(parts):
                if args.layer[i] == j:
                    delta = args.scaling[i] * (part @ args.lora_b[i].to(acc).t())
                    out = out + _in_served_rows(args, i, delta)
            y.append(out.to(x.dtype).reshape(*x.shape[:-1], n))
        h = torch.cat(parts, 1) if parts else x2.new_empty((x2.shape[0], 0), dtype=acc)
        return y, h.reshape(*x.shape[:-1], h.shape[1])

    @staticmethod
    def fake(args: Any) -> tuple[list[Tensor], Tensor]:
        y = [args.x.new_empty((*args.x.shape[:-1], n)) for n in args.out_features]
        return y, empty_h(args.x, sum(a.shape[0] for a in args.lora_a))

    differentiable = ("x", "weight", "bias", "lora_a", "lora_b")
    rounding = ("lora_a", "lora_b")
    saved_meta = ("bias", "y")
    saved_outputs = ("h",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Sequence[Tensor | None]) -> dict[str, Any]:
        x, compute_dtype = args.x, args.compute_dtype
        whole = [x.new_zeros(y.shape) if d is None else d for d, y in zip(dy, results.y, strict=True)]
        used = [d is not None for d in dy]
        need_weight, need_bias = (list(map(and_, wanted, used)) for wanted in (need.weight, need.bias))
        used = [used[j] for j in args.layer]
        need_a, need_b = (list(map(and_, wanted, used)) for wanted in (need.lora_a, need.lora_b))
        dx, da, db = ops.multi_lora_linear_backward(
            whole, x, results.h, *columns(args.bases), args.lora_a, args.lora_b, args.layer, args.scaling,
            args.dropout_p, args.seed, args.group, args.row_group, compute_dtype, need.x, need_a, need_b,
        )  # fmt: skip
        dw, dbias = layer_gradients(ops, whole, x, compute_dtype, args.bias, need_weight, need_bias)
        da, db = ([d if u else None for d, u in zip(found, used, strict=True)] for found in (da, db))
        return {"x": dx, "weight": dw, "bias": dbias, "lora_a": da, "lora_b": db}

    @staticmethod
    def flops(args: Any) -> int:
        return flops.layers(args.x, args.out_features, args.lora_a, args.lora_b)


class MultiLoraLinearBackward(Op):
    """Gradients not needed have no elements."""

    name = "multi_lora_linear_backward"
    schema = (
        "(Tensor[] dy, Tensor x, Tensor h, $bases, Tensor[] lora_a, Tensor[] lora_b, int[] layer, "
        "float[] scaling, float[] dropout_p, Tensor? seed, int[] group, Tensor? row_group, "
        "ScalarType? compute_dtype, bool need_dx, bool[] need_da, bool[] need_db) "
        "-> (Tensor dx, Tensor[] da, Tensor[] db)"
    )

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, seed = args.x, args.seed
        acc, compute = accumulator_dtype(x.dtype), args.compute_dtype or x.dtype
        x2, dy = rows(x), [rows(d) for d in args.dy]
        total = x2.new_zeros(x2.shape, dtype=acc)
        if args.need_dx:
            for base, d in zip(args.bases, dy, strict=True):
                w = dense_weight(base, (d.shape[1], x.shape[-1]), compute)
                total = total + (d.to(compute) @ w).to(acc)
        da, db = [], []
        h_parts = rows(args.h).split([a.shape[0] for a in args.lora_a], 1)
        for i, (a, b) in enumerate(zip(args.lora_a, args.lora_b, strict=True)):
            d, p, scaling = dy[args.layer[i]].to(acc), args.dropout_p[i], args.scaling[i]
            dh = _in_served_rows(args, i, scaling * (d @ b.to(acc)))
            mine = (
                (dh.t() @ apply_dropout(x2.to(acc), p, seed, i)).to(a.dtype)
                if args.need_da[i]
                else a.new_empty(0)
            )
            da.append(mine)
            db.append((scaling * (d.t() @ h_parts[i])).to(b.dtype) if args.need_db[i] else b.new_empty(0))
            if args.need_dx:
                total = total + _in_served_rows(args, i, apply_dropout(dh @ a.to(acc), p, seed, i))
        return total.to(x.dtype).view(x.shape) if args.need_dx else x.new_empty(0), da, db

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        da = [empty_unless(need, a) for a, need in zip(args.lora_a, args.need_da, strict=True)]
        db = [empty_unless(need, b) for b, need in zip(args.lora_b, args.need_db, strict=True)]
        return empty_unless(args.need_dx, args.x), da, db

    @staticmethod
    def flops(args: Any) -> int:
        needs = args.need_dx, args.need_da, args.need_db
        return flops.layers_backward(args.dy, args.x, args.lora_a, args.lora_b, *needs)


def layer_gradients(
    ops: Any,
    dy: Sequence[Tensor],
    x: Tensor,
    compute_dtype: torch.dtype | None,
    bias: Sequence[Any],
    need_weight: Sequence[bool],
    need_bias: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of dense base weights and of biases, for the layers that need them."""
    dw = [weight_grad(d, x, compute_dtype) if need else None for d, need in zip(dy, need_weight, strict=True)]
    dbias = [
        bias_grad(ops, d, b.dtype) if need else None for d, b, need in zip(dy, bias, need_bias, strict=True)
    ]
    return dw, dbias


def _in_served_rows(args: Any, adapter: int, values: Tensor) -> Tensor:
    """`values`, with zeros in rows that the adapter does not serve. Not a product, because 0 * Inf is NaN."""
    if args.row_group is None:
        return values
    return torch.where((args.row_group == args.group[adapter])[:, None], values, 0.0)


@dataclass
class Adapter:
    """One LoRA adapter of a layer: lora_a (r, in_features), lora_b (out_features, r)."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float = 0.0
    group: int = 0
    """Group of rows that the adapter serves, in calls with `row_group`."""
    rounds: bool = False
    """Whether fp32 lora_a and lora_b, and their gradients, are rounded to the dtype of 16-bit activations, as
    autocast rounds weights. If one adapter of a call is, all are."""


@dataclass
class AdaptedLinear:
    """A frozen linear layer, weight (out_features, in_features), and its adapters."""

    weight: Weight
    bias: Tensor | None = None
    adapters: Sequence[Adapter] = ()


@names_wrong_types
def multi_lora_linear(
    x: Tensor,
    layers: Sequence[AdaptedLinear],
    row_group: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Applies several linear layers to one x, each with the sum of any number of adapters.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        Read and saved for backward once for all layers.
    layers : sequence of AdaptedLinear
        For example query, key and value projections.
    row_group : Tensor, int64, (rows,), optional
        The group of each row of x (product of its leading sizes), served only by adapters of that `group`. A
        group without adapters uses the base layer only. By default all adapters serve all rows.
    compute_dtype : torch.dtype, optional
        As in `lora_linear`.

    Returns
    -------
    list of Tensor, (..., out_features) each, of x's dtype. Differentiability and errors as `lora_linear`.
    """
    if row_group is not None:
        count = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else x[..., :1].numel()
        if row_group.shape != (count,) or row_group.dtype != torch.int64:
            got = f"{row_group.dtype} of shape {tuple(row_group.shape)}"
            raise ValueError(f"row_group: expected int64 of shape ({count},), got {got}")
    compute = arguments.compute_type(x, compute_dtype)
    base, adapters, groups, seed = flatten(x, layers, [x.shape[-1]] * len(layers), compute, x.dtype)
    rounded = None if compute == x.dtype else compute
    args = (x, *base, *adapters, seed, groups, row_group, rounded)
    y = dispatch.call("multi_lora_linear", *args, rounds=rounding(layers, x.dtype))[0]
    return list(y)


def rounding(layers: Sequence[AdaptedLinear], inside: torch.dtype) -> torch.dtype | None:
    """The dtype that adapters of a call are rounded to for activations of dtype `inside`, or None."""
    if inside.itemsize != 2:
        return None
    return inside if any(one.rounds for layer in layers for one in layer.adapters) else None


def flatten(
    x: Tensor,
    layers: Sequence[AdaptedLinear],
    in_features: Sequence[int],
    compute: torch.dtype,
    inside: torch.dtype,
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[int], Tensor | None]:
    """Layers as the lists that ops take: of bases, of adapters, groups, and the seed. `inside`: dtype of the
    op's activations."""
    bases, out_features, biases = [], [], []
    none = x.new_empty(0)
    adapters: list[tuple[Any, ...]] = []
    groups = []
    for j, (item, features) in enumerate(zip(layers, in_features, strict=True)):
        shape, base = arguments.base_weight(x, item.weight, compute, features)
        arguments.check_bias(x, item.bias, shape[0], compute)
        bases.append(base)
        out_features.append(shape[0])
        biases.append(none if item.bias is None else arguments.bias_for_op(item.bias, inside, compute))
        for one in item.adapters:
            check_adapter(x, shape, one.lora_a, one.lora_b, one.dropout_p, inside)
            adapters.append((one.lora_a, one.lora_b, j, float(one.scaling), float(one.dropout_p)))
            groups.append(one.group)
    lists = tuple(list(column) for column in zip(*adapters, strict=True)) if adapters else ([],) * 5
    seed = new_seed(x) if any(lists[-1]) else None
    return (*columns(bases), out_features, biases), lists, groups, seed
