"""A linear layer with LoRA (Hu et al. 2021): base GEMM and low-rank delta in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import dispatch, flops
from ...core.op import Op
from ...core.wrong_types import names_wrong_types
from .. import arguments
from ..arguments import Weight
from ..common import accumulator_dtype, empty_h, empty_unless, rows, weight_grad
from ..nf4 import dense_weight
from ..sums import bias_grad
from .dropout import apply_dropout, new_seed


class LoraLinear(Op):
    """Returns y and h = drop(x) A^T, which backward needs.

    compute_dtype: dtype of the base GEMM, and of a dense weight. Only for that GEMM x (in backward dy) is
    rounded to it; sums, deltas and results are unaffected. None: x's dtype.
    """

    name = "lora_linear"
    schema = (
        "(Tensor x, $base, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
        "Tensor? seed, ScalarType? compute_dtype) -> (Tensor y, Tensor h)"
    )

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        x, a, b, bias = args.x, args.lora_a, args.lora_b, args.bias
        acc, compute = accumulator_dtype(x.dtype), args.compute_dtype or x.dtype
        weight = dense_weight(args.base, (b.shape[0], a.shape[1]), compute)
        h = apply_dropout(x.to(acc), args.dropout_p, args.seed) @ a.to(acc).t()
        base = F.linear(x.to(compute), weight, None if bias is None else bias.to(compute))
        return (base.to(acc) + args.scaling * (h @ b.to(acc).t())).to(x.dtype), h

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        y = args.x.new_empty((*args.x.shape[:-1], args.lora_b.shape[0]))
        return y, empty_h(args.x, args.lora_a.shape[0])

    differentiable = ("x", "weight", "bias", "lora_a", "lora_b")
    rounding = ("lora_a", "lora_b")
    saved_meta = ("bias", "y")
    saved_outputs = ("h",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        x, compute_dtype = args.x, args.compute_dtype
        dx, da, db = ops.lora_linear_backward(
            dy, x, results.h, *args.base, args.lora_a, args.lora_b, args.scaling, args.dropout_p, args.seed,
            compute_dtype, need.x, need.lora_a, need.lora_b,
        )  # fmt: skip
        dw = weight_grad(dy, x, compute_dtype) if need.weight else None
        dbias = bias_grad(ops, dy, args.bias.dtype) if need.bias else None
        return {"x": dx, "weight": dw, "bias": dbias, "lora_a": da, "lora_b": db}

    @staticmethod
    def flops(args: Any) -> int:
        return flops.layers(args.x, [args.lora_b[0]], [args.lora_a], [args.lora_b])


class LoraLinearBackward(Op):
    """Gradients not needed have no elements."""

    name = "lora_linear_backward"
    schema = (
        "(Tensor dy, Tensor x, Tensor h, $base, Tensor lora_a, Tensor lora_b, float scaling, "
        "float dropout_p, Tensor? seed, ScalarType? compute_dtype, bool need_dx, bool need_da, bool need_db) "
        "-> (Tensor dx, Tensor da, Tensor db)"
    )

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b, scaling = args.x, args.lora_a, args.lora_b, args.scaling
        p, seed = args.dropout_p, args.seed
        acc, compute = accumulator_dtype(x.dtype), args.compute_dtype or x.dtype
        dy, x2 = rows(args.dy), rows(x)
        dy_acc = dy.to(acc)
        dh = scaling * (dy_acc @ b.to(acc))
        dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
        if args.need_dx:
            weight = dense_weight(args.base, (b.shape[0], a.shape[1]), compute)
            delta = apply_dropout(dh @ a.to(acc), p, seed)
            dx = ((dy.to(compute) @ weight).to(acc) + delta).to(x.dtype).view(x.shape).contiguous()
        if args.need_da:
            da = (dh.t() @ apply_dropout(x2.to(acc), p, seed)).to(a.dtype)
        if args.need_db:
            db = (scaling * (dy_acc.t() @ rows(args.h))).to(b.dtype)
        return dx, da, db

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dx, da = empty_unless(args.need_dx, args.x), empty_unless(args.need_da, args.lora_a)
        return dx, da, empty_unless(args.need_db, args.lora_b)

    @staticmethod
    def flops(args: Any) -> int:
        needs = args.need_dx, [args.need_da], [args.need_db]
        return flops.layers_backward([args.dy], args.x, [args.lora_a], [args.lora_b], *needs)


@names_wrong_types
def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T + bias + scaling * (drop(x) A^T) B^T`: base GEMM and low-rank delta (Hu et al. 2021) in one
    call.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16.
    weight : PackedWeight or Tensor, (out_features, in_features)
        The base: NF4 (frozen), or dense in compute_dtype.
    lora_a : Tensor, (r, in_features)
    lora_b : Tensor, (out_features, r)
        Each fp32 or of x's dtype; an fp32 adapter causes no fp32 copy of x.
    scaling : float
        alpha / r, or alpha / sqrt(r) for rsLoRA.
    bias : Tensor, (out_features,), optional
        Of x's dtype, of compute_dtype or fp32.
    dropout_p : float
        Probability of dropping an element of x on its way to A; the base GEMM uses all of x. The mask depends
        only on a seed drawn from torch's generator for x's device: it follows torch.manual_seed and
        activation checkpointing, and is not stored.
    compute_dtype : torch.dtype, optional
        fp32, bf16 or fp16, the dtype of the base GEMM: only for it x, and in backward the output's gradient,
        are rounded. The delta is computed from the unrounded x. By default x's dtype.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x, lora_a, lora_b, bias and a dense weight;
    each gradient has its parameter's dtype. Saved for backward: x, x A^T, the seed and the parameters.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; an NF4 weight that requires grad; dropout_p not in 0 to 1.
    """
    args = lora_linear_args(x, weight, lora_a, lora_b, scaling, bias, dropout_p, compute_dtype)
    y: Tensor = dispatch.call("lora_linear", x, *args)[0]
    return y


def lora_linear_args(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """The checked arguments of op `lora_linear` after x."""
    compute = arguments.compute_type(x, compute_dtype)
    shape, base = arguments.base_weight(x, weight, compute)
    arguments.check_bias(x, bias, shape[0], compute)
    check_adapter(x, shape, lora_a, lora_b, dropout_p)
    adapter = (lora_a, lora_b, float(scaling), float(dropout_p), new_seed(x) if dropout_p else None)
    return (*base, bias, *adapter, None if compute == x.dtype else compute)


def check_adapter(
    x: Tensor,
    shape: tuple[int, int],
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float,
    inside: torch.dtype | None = None,
) -> None:
    """Raises ValueError unless the adapter fits x and a weight of `shape`. `inside`: dtype of activations, by
    default x's."""
    dtype, device = inside or x.dtype, x.device
    if lora_a.dim() != 2 or lora_a.shape[1] != shape[1]:
        raise ValueError(f"lora_a: expected shape (r, {shape[1]}), got {tuple(lora_a.shape)}")
    expected = shape[0], lora_a.shape[0]
    if lora_b.shape != expected:
        raise ValueError(f"lora_b: expected shape {expected}, got {tuple(lora_b.shape)}")
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype != dtype and adapter.dtype != torch.float32:
            like = "x" if dtype == x.dtype else "compute_dtype"
            raise ValueError(f"{name}: expected {dtype} like {like} or float32, got {adapter.dtype}")
        if adapter.device != device:
            raise ValueError(f"{name}: expected device {device} like x, got {adapter.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected 0 to 1, got {dropout_p}")
