"""Autograd formulas of the ops in `spec`.

For each op a pair, `<op>_setup` and `<op>_backward`, as `autograd.register` wants them; only that the latter
gets the ops that it is to call before all else, so that a back end's backward is its own too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

Grads = tuple[Any, ...]


def _flat(values: Any) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]


class _Refusal(torch.autograd.Function):
    """The first `count` tensors, with an error in place of their gradient in any of the tensors."""

    @staticmethod
    def forward(ctx: Any, sentence: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sentence = sentence
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.sentence)


def _first_order(formula: Callable[..., Grads]) -> Callable[..., Grads]:
    """For formulas whose own gradient there is none of: asking for it raises, where torch would only warn or
    take the formula's results for constants."""

    @functools.wraps(formula)
    def checked(ops: Any, ctx: Any, saved: Grads, needed: Grads, *grads: Any) -> Grads:
        if grads[0] is None:  # of an output that no loss depends on
            return (None,) * len(needed)
        with torch.no_grad():
            result = formula(ops, ctx, saved, needed, *grads)
        if not torch.is_grad_enabled():  # only with create_graph=True
            return result
        name = formula.__name__.removesuffix("_backward")
        sentence = f"{name}: a gradient of its gradients was asked for, expected first order only"
        found = [t for t in _flat(result) if t is not None]
        sources = [t for t in _flat((*saved, *grads)) if t is not None and t.requires_grad]
        refusing = iter(_Refusal.apply(sentence, len(found), *found, *sources))

        def replaced(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [replaced(v) for v in value]
            return None if value is None else next(refusing)

        return tuple(replaced(value) for value in result)

    return checked


def _only_saved(ctx: Any, *outputs: Tensor) -> None:
    """Outputs that leave an op only to be saved: a gradient through them has no formula. Nor are zeros made
    for them, which would cost as much memory as they do; gradients of other outputs may so be None too."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def _bias_grad(dy: Tensor, bias_dtype: torch.dtype) -> Tensor:
    return reference.rows(dy).sum(0, dtype=reference.accumulator_dtype(dy.dtype)).to(bias_dtype)


def _weight_grad(dy: Tensor, x: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """Of a dense base weight: it comes from the base product alone."""
    dtype = compute_dtype or x.dtype
    return reference.rows(dy).to(dtype).t() @ reference.rows(x).to(dtype)


def nf4_linear_setup(ctx: Any, inputs: Grads, output: Tensor) -> Grads:
    x, packed, absmax, absmax2, offset, blocksize, _, bias = inputs
    ctx.blocksize, ctx.in_features = blocksize, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    return packed, absmax, absmax2, offset


def nf4_linear_backward(ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: Tensor) -> Grads:
    need_x, *_, need_bias = needed
    dx = ops.nf4_linear_dx(dy, *saved, ctx.blocksize, ctx.in_features) if need_x else None
    return dx, None, None, None, None, None, None, _bias_grad(dy, ctx.bias_dtype) if need_bias else None


def nf4_linear_dx_setup(ctx: Any, inputs: Grads, output: Tensor) -> Grads:
    dy, packed, absmax, absmax2, offset, blocksize, _ = inputs
    ctx.blocksize, ctx.out_features = blocksize, dy.shape[-1]
    return packed, absmax, absmax2, offset


def nf4_linear_dx_backward(ops: Any, ctx: Any, saved: Grads, needed: Grads, g: Tensor) -> Grads:
    # dx is linear in dy, with the transposed weight: its own gradient is the forward product.
    d_dy = ops.nf4_linear(g, *saved, ctx.blocksize, ctx.out_features, None)
    return d_dy, None, None, None, None, None, None


def lora_linear_setup(ctx: Any, inputs: Grads, output: tuple[Tensor, Tensor]) -> Grads:
    (
        x, weight, absmax, absmax2, offset, blocksize, bias, lora_a, lora_b, scaling, dropout_p, seed,
        ctx.compute_dtype,
    ) = inputs  # fmt: skip
    ctx.blocksize, ctx.scaling, ctx.dropout_p = blocksize, scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype
    _only_saved(ctx, output[1])
    return x, output[1], weight, absmax, absmax2, offset, lora_a, lora_b, seed


@_first_order
def lora_linear_backward(
    ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: Tensor, _dh: Tensor | None
) -> Grads:
    x, h, weight, absmax, absmax2, offset, lora_a, lora_b, seed = saved
    need_x, need_w, need_bias, need_a, need_b = (needed[i] for i in (0, 1, 6, 7, 8))
    dx, da, db = ops.lora_linear_backward(
        dy, x, h, weight, absmax, absmax2, offset, ctx.blocksize, lora_a, lora_b,
        ctx.scaling, ctx.dropout_p, seed, ctx.compute_dtype, need_x, need_a, need_b,
    )  # fmt: skip
    dw = _weight_grad(dy, x, ctx.compute_dtype) if need_w else None
    dbias = _bias_grad(dy, ctx.bias_dtype) if need_bias else None
    return (
        dx if need_x else None, dw, None, None, None, None, dbias,
        da if need_a else None, db if need_b else None, None, None, None, None,
    )  # fmt: skip


def _chosen(grads: Any, needed: Any) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _layer_grads(
    dy: Any, x: Tensor, compute_dtype: Any, bias_dtypes: Any, need_weight: Any, need_bias: Any
) -> tuple[Any, Any]:
    """Gradients of dense base weights and of biases, for the layers that need them."""
    dw = [
        _weight_grad(d, x, compute_dtype) if need else None for d, need in zip(dy, need_weight, strict=True)
    ]
    dbias = [
        _bias_grad(d, dtype) if need else None
        for d, dtype, need in zip(dy, bias_dtypes, need_bias, strict=True)
    ]
    return dw, dbias


def _layers_grads(needed: Grads, dx: Tensor, dw: Any, dbias: Any, da: Any, db: Any) -> Grads:
    """Gradients of an op that takes layers as lists, where needed."""
    grads: list[Any] = [None] * len(needed)
    if needed[0]:
        grads[0] = dx
    grads[1], grads[7] = dw, dbias
    grads[8], grads[9] = _chosen(da, needed[8]), _chosen(db, needed[9])
    return tuple(grads)


def multi_lora_linear_setup(ctx: Any, inputs: Grads, output: Any) -> Grads:
    (
        x, weight, absmax, absmax2, offset, blocksize, _, bias, lora_a, lora_b, layer, scaling, dropout_p,
        seed, group, row_group, ctx.compute_dtype,
    ) = inputs  # fmt: skip
    ctx.blocksize, ctx.layer, ctx.scaling, ctx.dropout_p = blocksize, layer, scaling, dropout_p
    ctx.group, ctx.bias_dtypes = group, [b.dtype for b in bias]
    ctx.y_shapes = [y.shape for y in output[0]]
    _only_saved(ctx, output[1])
    return x, output[1], weight, absmax, absmax2, offset, lora_a, lora_b, seed, row_group


@_first_order
def multi_lora_linear_backward(
    ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: list[Tensor | None], _dh: Tensor | None
) -> Grads:
    x, h, weight, absmax, absmax2, offset, lora_a, lora_b, seed, row_group = saved
    dy = [x.new_zeros(s) if d is None else d for d, s in zip(dy, ctx.y_shapes, strict=True)]
    need_x, need_w, need_bias, need_a, need_b = (needed[i] for i in (0, 1, 7, 8, 9))
    dx, da, db = ops.multi_lora_linear_backward(
        dy, x, h, weight, absmax, absmax2, offset, ctx.blocksize, lora_a, lora_b, ctx.layer, ctx.scaling,
        ctx.dropout_p, seed, ctx.group, row_group, ctx.compute_dtype, need_x, need_a, need_b,
    )  # fmt: skip
    dw, dbias = _layer_grads(dy, x, ctx.compute_dtype, ctx.bias_dtypes, need_w, need_bias)
    return _layers_grads(needed, dx, dw, dbias, da, db)


# A gated MLP is written in terms of the ops above, once for all back ends: down(act(gate(x)) * up(x)).


class _Mlp:
    """The arguments of `gated_mlp`, cut into those of its two calls of `multi_lora_linear`."""

    def __init__(self, weights: list[Any], layer: list[int]) -> None:
        self.first, self.last = [w[:2] for w in weights], [w[2:] for w in weights]
        self.of_first = [i for i, j in enumerate(layer) if j < 2]
        self.of_last = [i for i, j in enumerate(layer) if j == 2]
        self.layer = layer

    def adapters(self, down: bool, *lists: Any) -> list[Any]:
        chosen = self.of_last if down else self.of_first
        return [[values[i] for i in chosen] for values in lists]

    def layers(self, down: bool) -> list[int]:
        return [0] * len(self.of_last) if down else [self.layer[i] for i in self.of_first]

    def merge(self, first: list[Any], last: list[Any]) -> list[Any]:
        merged = [None] * len(self.layer)
        for chosen, values in ((self.of_first, first), (self.of_last, last)):
            for i, value in zip(chosen, values, strict=True):
                merged[i] = value
        return merged


def _down_seed(seed: Tensor | None) -> Tensor | None:
    # Another key: gate and down must not draw from one stream.
    return None if seed is None else seed + 1


def gated_mlp(
    ops: Any, x: Tensor, weight: Any, absmax: Any, absmax2: Any, offset: Any, blocksize: Any,
    out_features: Any, bias: Any, lora_a: Any, lora_b: Any, layer: Any, scaling: Any, dropout_p: Any,
    seed: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mlp = _Mlp([weight, absmax, absmax2, offset, blocksize, out_features, bias], layer)

    def call(down: bool, x: Tensor, seed: Tensor | None) -> Any:
        a, b, s, p = mlp.adapters(down, lora_a, lora_b, scaling, dropout_p)
        base = mlp.last if down else mlp.first
        return ops.multi_lora_linear(x, *base, a, b, mlp.layers(down), s, p, seed, [0] * len(a), None, None)

    (gate, up), h = call(False, x, seed)
    (y,), h_down = call(True, ops.gated_activation(gate, up, activation), _down_seed(seed))
    return y, gate, up, h, h_down


def gated_mlp_setup(ctx: Any, inputs: Grads, output: Any) -> Grads:
    (
        x, weight, absmax, absmax2, offset, blocksize, _, bias, lora_a, lora_b, layer, scaling, dropout_p,
        seed, activation,
    ) = inputs  # fmt: skip
    _, gate, up, h, h_down = output
    ctx.blocksize, ctx.layer, ctx.scaling, ctx.dropout_p = blocksize, layer, scaling, dropout_p
    ctx.activation, ctx.bias_dtypes = activation, [b.dtype for b in bias]
    _only_saved(ctx, gate, up, h, h_down)
    return x, gate, up, h, h_down, weight, absmax, absmax2, offset, lora_a, lora_b, seed


@_first_order
def gated_mlp_backward(ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: Tensor, *_: Any) -> Grads:
    x, gate, up, h, h_down, weight, absmax, absmax2, offset, lora_a, lora_b, seed = saved
    need_x, need_w, need_bias, need_a, need_b = (needed[i] for i in (0, 1, 7, 8, 9))
    mlp = _Mlp([weight, absmax, absmax2, offset, ctx.blocksize], ctx.layer)

    def call(down: bool, dy: list[Tensor], x: Tensor, h: Tensor, seed: Tensor | None, need_dx: bool) -> Any:
        a, b, s, p, da, db = mlp.adapters(down, lora_a, lora_b, ctx.scaling, ctx.dropout_p, need_a, need_b)
        base = mlp.last if down else mlp.first
        return ops.multi_lora_linear_backward(
            dy, x, h, *base, a, b, mlp.layers(down), s, p, seed, [0] * len(a), None, None, need_dx, da, db
        )

    product = ops.gated_activation(gate, up, ctx.activation)
    d_product, da_down, db_down = call(True, [dy], product, h_down, _down_seed(seed), True)
    dw_down, dbias_down = _layer_grads([dy], product, None, ctx.bias_dtypes[2:], need_w[2:], need_bias[2:])
    del product
    d_gate, d_up = ops.gated_activation_backward(d_product, gate, up, ctx.activation)
    del d_product
    dx, da, db = call(False, [d_gate, d_up], x, h, seed, need_x)
    dw, dbias = _layer_grads([d_gate, d_up], x, None, ctx.bias_dtypes[:2], need_w[:2], need_bias[:2])
    return _layers_grads(
        needed, dx, dw + dw_down, dbias + dbias_down, mlp.merge(da, da_down), mlp.merge(db, db_down)
    )


def dora_scale_setup(ctx: Any, inputs: Grads, output: Tensor) -> Grads:
    return inputs


@_first_order
def dora_scale_backward(ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: Tensor) -> Grads:
    need_z, need_scale, need_bias = needed
    _, scale, bias = saved
    dz = dscale = dbias = None
    if need_z or need_scale:
        dz, dscale = ops.dora_scale_backward(dy, *saved)
    if need_bias:  # what is left of it: z holds the bias too
        dbias = ((1 - scale) * _bias_grad(dy, scale.dtype)).to(bias.dtype)
    return dz if need_z else None, dscale if need_scale else None, dbias


def dropout_setup(ctx: Any, inputs: Grads, output: Tensor) -> Grads:
    _, ctx.p, seed = inputs
    return (seed,)


def dropout_backward(ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: Tensor) -> Grads:
    return ops.dropout(dy, ctx.p, *saved), None, None


def gated_activation_setup(ctx: Any, inputs: Grads, output: Tensor) -> Grads:
    gate, up, ctx.activation = inputs
    return gate, up


@_first_order
def gated_activation_backward(ops: Any, ctx: Any, saved: Grads, needed: Grads, dy: Tensor) -> Grads:
    d_gate, d_up = ops.gated_activation_backward(dy, *saved, ctx.activation)
    need_gate, need_up, _ = needed
    return d_gate if need_gate else None, d_up if need_up else None, None
