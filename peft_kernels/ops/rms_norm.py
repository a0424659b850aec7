"""Root mean square norm (Zhang and Sennrich 2019), as the models of Llama's kind compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .common import accumulator_dtype, empty_unless, rows
from .registry import Op


class RmsNorm(Op):
    """The statistics of rows are fp32, what is normed is rounded to x's dtype before it meets the weight.
    `rstd` is 1 / the root, of each row."""

    name = "rms_norm"
    schema = "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)"
    composite = True

    @staticmethod
    def meaning(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        x = args.x.to(accumulator_dtype(args.x.dtype))
        rstd = torch.rsqrt(x.pow(2).mean(-1) + args.eps)
        y = args.weight * (x * rstd[..., None]).to(args.x.dtype)
        return y.contiguous(), rstd.contiguous()

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        x = args.x
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, args.weight.dtype))
        return y, x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))

    differentiable = ("x", "weight")
    kept = ("rstd",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        dx, dweight = ops.rms_norm_backward(dy, args.x, args.weight, results.rstd, need.x, need.weight)
        return {"x": dx, "weight": dweight}


class RmsNormBackward(Op):
    """Gradients that are not needed have no elements."""

    name = "rms_norm_backward"
    schema = (
        "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_dx, bool need_dweight) "
        "-> (Tensor dx, Tensor dweight)"
    )
    composite = True

    @staticmethod
    def meaning(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        x, weight = args.x, args.weight
        acc = accumulator_dtype(x.dtype)
        dy, rstd = args.dy.to(acc), args.rstd[..., None]
        normed = x.to(acc) * rstd
        dx, dweight = x.new_empty(0), weight.new_empty(0)
        if args.need_dx:
            d = dy * weight.to(acc)
            dx = (rstd * (d - normed * (d * normed).mean(-1, keepdim=True))).to(x.dtype).contiguous()
        if args.need_dweight:
            dweight = rows(dy * normed.to(x.dtype).to(acc)).sum(0).to(weight.dtype)
        return dx, dweight

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        return empty_unless(args.need_dx, args.x), empty_unless(args.need_dweight, args.weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` of rows, with the roundings of transformers' `LlamaRMSNorm`: fp32
    inside, rounded to x's dtype, then times the weight.

    Parameters
    ----------
    x : Tensor, (..., features)
        fp32, bf16 or fp16.
    weight : Tensor, (features,)
        fp32, bf16 or fp16, not necessarily as x.
    eps : float
        Not negative.

    Returns
    -------
    Tensor, like x, contiguous, of the dtype to which torch promotes x's and weight's. Differentiable in x and
    weight. Saved for backward: both, and an fp32 number for each row.

    Raises
    ------
    ValueError
        Shapes or devices that do not fit, dtypes that are not floating; a negative eps.
    """
    if not x.dtype.is_floating_point or not weight.dtype.is_floating_point:
        name, dtype = ("weight", weight.dtype) if x.dtype.is_floating_point else ("x", x.dtype)
        raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
    if weight.dim() != 1 or not weight.shape[0]:
        raise ValueError(f"weight: expected shape (features,), got {tuple(weight.shape)}")
    if not x.dim() or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x: expected shape (..., {weight.shape[0]}), got {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} like x, got {weight.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    y: Tensor = dispatch.call("rms_norm", x, weight, float(eps))[0]
    return y
