"""Linear layers with a frozen NF4 weight, and the gradient of their input."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch
from ..core.op import Base, Op
from ..core.packed_state import HoldsPacked, PackedState
from ..core.wrong_types import names_wrong_types
from . import arguments
from .arguments import autocast_dtype, no_autocast
from .nf4 import dense_weight
from .sums import bias_grad


class NF4Linear(Op):
    name = "nf4_linear"
    schema = "(Tensor x, $nf4, SymInt out_features, Tensor? bias) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        x, bias = args.x, args.bias
        weight = dense_weight(args.base, (args.out_features, x.shape[-1]), x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.x.new_empty((*args.x.shape[:-1], args.out_features))

    differentiable = ("x", "bias")
    saved_meta = ("x", "bias")
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        return {
            "x": ops.nf4_linear_dx(dy, *args.base, args.x.shape[-1]) if need.x else None,
            "bias": bias_grad(ops, dy, args.bias.dtype) if need.bias else None,
        }

    @staticmethod
    def flops(args: Any) -> int:
        return 2 * prod(args.x) * args.out_features


class NF4LinearDx(Op):
    name = "nf4_linear_dx"
    schema = "(Tensor dy, $nf4, SymInt in_features) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        dy = args.dy
        return dy @ dense_weight(args.base, (dy.shape[-1], args.in_features), dy.dtype)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.dy.new_empty((*args.dy.shape[:-1], args.in_features))

    differentiable = ("dy",)
    saved_meta = ("dy",)
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        # dx is linear in dy, with the transposed weight, so its gradient is the forward op.
        return {"dy": ops.nf4_linear(dy, *args.base, args.dy.shape[-1], None)}

    @staticmethod
    def flops(args: Any) -> int:
        return 2 * prod(args.dy) * args.in_features


@names_wrong_types
def nf4_linear(
    x: Tensor,
    weight: HoldsPacked | PackedState,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T + bias` with a frozen NF4 weight, dequantised inside the kernel.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16. Accumulates in fp32.
    weight : PackedWeight, (out_features, in_features)
    bias : Tensor, (out_features,), optional
        Of x's dtype, of compute_dtype or fp32.
    compute_dtype : torch.dtype, optional
        fp32, bf16 or fp16: x is rounded to it, and so is the result before it is cast to x's dtype, as in
        bitsandbytes' Linear4bit. By default x's dtype.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x and bias.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; a weight that requires grad.
    """
    if not isinstance(weight, (HoldsPacked, PackedState)):
        raise ValueError(f"weight: expected a PackedWeight, got {type(weight).__name__}")
    compute = arguments.compute_type(x, compute_dtype)
    shape, base = arguments.base_weight(x, weight, compute)
    arguments.check_bias(x, bias, shape[0], compute)
    return base_linear(x, shape[0], base, bias, compute)


def base_linear(
    x: Tensor, out_features: int, base: Base, bias: Tensor | None, compute: torch.dtype
) -> Tensor:
    """x W^T + bias, rounded to `compute`, in x's dtype."""
    if base.absmax is None:
        y = _dense_linear(x.to(compute), base.weight, None if bias is None else bias.to(compute))
    else:
        bias = None if bias is None else arguments.bias_for_op(bias, compute)
        rounded = x if compute == x.dtype else x.to(compute)
        y = dispatch.call("nf4_linear", rounded, *base, out_features, bias)
    return y if compute == x.dtype else y.to(x.dtype)


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in the operands' dtype, ignoring autocast."""
    device = x.device.type
    if autocast_dtype(device) is None:
        return F.linear(x, weight, bias)
    with no_autocast(device):
        return F.linear(x, weight, bias)
