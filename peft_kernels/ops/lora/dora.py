"""DoRA (Liu et al. 2024): the row norms of W0 + s B A, and the scaling by magnitudes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.op import Base, Op
from ...core.wrong_types import names_wrong_types
from .. import arguments
from ..arguments import Weight
from ..common import accumulator_dtype, rows
from ..linear import base_linear
from ..nf4 import dense_weight
from ..sums import bias_grad
from .dropout import new_seed
from .lora import check_adapter, lora_linear


class DoraNorm(Op):
    """||W + s B A|| per row."""

    name = "dora_norm"
    schema = "($base, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        acc, scaling = accumulator_dtype(args.lora_a.dtype), args.scaling
        a, b = args.lora_a.to(acc), args.lora_b.to(acc)
        w = dense_weight(args.base, (b.shape[0], a.shape[1]), acc).to(acc)
        # Without forming B A.
        square = w.square().sum(1) + (2 * scaling * (w @ a.t()) * b).sum(1)
        square = square + (scaling**2 * (b @ (a @ a.t())) * b).sum(1)
        return square.clamp(min=0).sqrt()

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.lora_b.new_empty(args.lora_b.shape[0], dtype=accumulator_dtype(args.lora_a.dtype))

    @staticmethod
    def flops(args: Any) -> int:
        """FLOPs of W A^T, A A^T and B (A A^T)."""
        (r, k), n = args.lora_a, args.lora_b[0]
        return 2 * r * (n * k + r * k + n * r)


class DoraScale(Op):
    """Scales the output z of a layer per column, except for its bias, which z includes."""

    name = "dora_scale"
    schema = "(Tensor z, Tensor scale, Tensor? bias) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        z, scale, bias = args
        acc = accumulator_dtype(z.dtype)
        # Not (z - bias) * scale + bias: with a scale of 1 z must stay bit-equal.
        y = z.to(acc) + (scale.to(acc) - 1) * _unbiased(z, bias)
        return (z.to(acc) * scale.to(acc) if bias is None else y).to(z.dtype)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.z.new_empty(args.z.shape)

    differentiable = ("z", "scale", "bias")

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        z, scale, bias = args
        dz = dscale = dbias = None
        if need.z or need.scale:
            dz, dscale = ops.dora_scale_backward(dy, z, scale, bias)
        if need.bias:  # z's gradient covers the rest, as z includes the bias
            dbias = ((1 - scale) * bias_grad(ops, dy, scale.dtype)).to(bias.dtype)
        return {"z": dz, "scale": dscale, "bias": dbias}


class DoraScaleBackward(Op):
    name = "dora_scale_backward"
    schema = "(Tensor dy, Tensor z, Tensor scale, Tensor? bias) -> (Tensor dz, Tensor dscale)"

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        dy, z, scale, bias = args
        acc = accumulator_dtype(z.dtype)
        dz = (dy.to(acc) * scale.to(acc)).to(dy.dtype)
        return dz, (rows(dy).to(acc) * rows(_unbiased(z, bias))).sum(0).to(scale.dtype)

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        return args.dy.new_empty(args.dy.shape), args.scale.new_empty(args.scale.shape)


def _unbiased(z: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator_dtype(z.dtype)
    return z.to(acc) if bias is None else z.to(acc) - bias.to(acc)


@names_wrong_types
def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """`magnitude / ||V|| * (x V^T) + bias` with V = W + scaling * B A and norms per row: DoRA (Liu et al.
    2024).

    As in PEFT, the norm is a constant for the gradient, and with dropout the result is `x W^T + (m / ||V|| -
    1) drop(x) W^T + m / ||V|| scaling drop(x) A^T B^T`. The norm is computed from W A^T, B and A A^T, without
    forming B A or V, and is not cached.

    Parameters
    ----------
    x, weight, lora_a, lora_b, scaling, bias, dropout_p, compute_dtype
        As in `lora_linear`.
    magnitude : Tensor, (out_features,)
    norm : Tensor, fp32 (out_features,), optional
        `dora_norm` of the same weight, lora_a, lora_b and scaling. By default it is computed.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x, lora_a, lora_b, magnitude, bias and a
    dense weight. Saved for backward: what `lora_linear` saves, and one tensor of the output's size; if x is
    fp16, both in fp32.
    """
    compute = arguments.compute_type(x, compute_dtype)
    shape, base = arguments.base_weight(x, weight, compute)
    arguments.check_bias(x, bias, shape[0], compute)
    check_adapter(x, shape, lora_a, lora_b, dropout_p)
    if magnitude.shape != (shape[0],):
        raise ValueError(f"magnitude: expected shape ({shape[0]},), got {tuple(magnitude.shape)}")
    if norm is None:
        norm = _norm(x, base, lora_a, lora_b, scaling)
    elif norm.shape != (shape[0],) or norm.dtype is not torch.float32:
        raise ValueError(f"norm: expected float32 ({shape[0]},), got {norm.dtype} {tuple(norm.shape)}")
    scale = _factors(magnitude, norm)
    dropped = dispatch.call("dropout", x, float(dropout_p), new_seed(x)) if dropout_p else x
    rest = base_linear(x - dropped, shape[0], base, bias, compute) if dropout_p else bias
    if x.dtype is torch.float16:  # base and delta in fp32: before it is scaled, their sum may exceed fp16
        z = lora_linear(dropped.float(), weight, lora_a.float(), lora_b.float(), scaling, None, 0.0, compute)
    elif dropout_p or bias is None:
        z = lora_linear(dropped, weight, lora_a, lora_b, scaling, compute_dtype=compute)
    else:
        z = lora_linear(x, weight, lora_a, lora_b, scaling, bias, compute_dtype=compute)
        scaled: Tensor = dispatch.call("dora_scale", z, scale, arguments.bias_for_op(bias, x.dtype))
        return scaled
    product: Tensor = dispatch.call("dora_scale", z, scale, None)
    return product.to(x.dtype) if rest is None else (rest + product).to(x.dtype)


def dora_norm(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`||V||` of `dora_linear` per row, fp32 (out_features,). Only dtype, device and last size of x
    matter."""
    compute = arguments.compute_type(x, compute_dtype)
    shape, base = arguments.base_weight(x, weight, compute)
    check_adapter(x, shape, lora_a, lora_b, 0.0)
    return _norm(x, base, lora_a, lora_b, scaling)


def dora_factors(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`magnitude / ||V||` of `dora_linear`, fp32 (out_features,), for layers whose parameters do not change.
    x as in `dora_norm`."""
    return _factors(magnitude, dora_norm(x, weight, lora_a, lora_b, scaling, compute_dtype))


def _norm(x: Tensor, base: Base, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    frozen = base._replace(weight=base.weight.detach())
    norm: Tensor = dispatch.call(
        "dora_norm", *frozen, lora_a.detach(), lora_b.detach(), float(scaling), like=x
    )
    return norm


def _factors(magnitude: Tensor, norm: Tensor) -> Tensor:
    return magnitude.float() / norm.to(magnitude.dtype).float()
