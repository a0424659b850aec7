"""Root mean square norm (Zhang and Sennrich 2019) as in Llama-like models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.op import Op
from ...core.wrong_types import names_wrong_types
from ..common import accumulator_dtype, empty_unless, rows


def _normed(args: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulator_dtype(x.dtype)
    rstd = torch.rsqrt(x.to(acc).pow(2).mean(-1) + args.eps)
    normed = x.to(acc) * rstd[..., None]
    if args.rounds:
        normed = normed.to(x.dtype).to(acc)
    y = (args.weight.to(acc) + args.offset) * normed
    return y.to(args.dtype).contiguous(), rstd.contiguous()


class RmsNorm(Op):
    """(weight + offset) * x * rstd, with fp32 statistics rstd = 1 / rms per row. If `rounds`, x * rstd is
    rounded to x's dtype before it is multiplied."""

    name = "rms_norm"
    schema = (
        "(Tensor x, Tensor weight, float eps, float offset, bool rounds, ScalarType dtype) "
        "-> (Tensor y, Tensor rstd)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        return _normed(args, args.x)

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        x = args.x
        return x.new_empty(x.shape, dtype=args.dtype), _empty_row_statistics(x)

    differentiable = ("x", "weight")
    saved_outputs = ("rstd",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        how = (args.offset, args.rounds, need.x, need.weight)
        dx, dweight = ops.rms_norm_backward(dy, args.x, args.weight, results.rstd, None, *how)
        return {"x": dx, "weight": dweight}


class AddRmsNorm(Op):
    """The norm of x + residual, and this sum, rounded to their promoted dtype."""

    name = "add_rms_norm"
    schema = (
        "(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool rounds, ScalarType dtype) "
        "-> (Tensor y, Tensor sum, Tensor rstd)"
    )
    composite = True
    num_outputs = 2

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        total = (args.x + args.residual).contiguous()
        y, rstd = _normed(args, total)
        return y, total, rstd

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor]:
        total = args.x.new_empty(args.x.shape, dtype=torch.promote_types(args.x.dtype, args.residual.dtype))
        return total.new_empty(total.shape, dtype=args.dtype), total, _empty_row_statistics(total)

    differentiable = ("x", "residual", "weight")
    saved_meta = ("x", "residual")
    saved_outputs = ("sum", "rstd")

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: tuple[Any, Any]) -> dict[str, Any]:
        of_y, of_sum = dy
        if of_y is None:
            dx, dweight = of_sum, None
        else:
            how = (args.offset, args.rounds, need.x or need.residual, need.weight)
            dx, dweight = ops.rms_norm_backward(of_y, results.sum, args.weight, results.rstd, of_sum, *how)
        return {"x": dx.to(args.x.dtype), "residual": dx.to(args.residual.dtype), "weight": dweight}


class RmsNormBackward(Op):
    """`add`, like x, is added to dx. Gradients not needed have no elements."""

    name = "rms_norm_backward"
    schema = (
        "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? add, float offset, bool rounds, "
        "bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        x, weight = args.x, args.weight
        acc = accumulator_dtype(x.dtype)
        dy, rstd = args.dy.to(acc), args.rstd[..., None]
        normed = x.to(acc) * rstd
        dx, dweight = x.new_empty(0), weight.new_empty(0)
        if args.need_dx:
            d = dy * (weight.to(acc) + args.offset)
            wide = rstd * (d - normed * (d * normed).mean(-1, keepdim=True))
            if args.add is not None:
                wide = wide + args.add
            dx = wide.to(x.dtype).contiguous()
        if args.need_dweight:
            rounded = normed.to(x.dtype).to(acc) if args.rounds else normed
            dweight = rows(dy * rounded).sum(0).to(weight.dtype)
        return dx, dweight

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        return empty_unless(args.need_dx, args.x), empty_unless(args.need_dweight, args.weight)


def _empty_row_statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))


CASTING = {"llama": True, "gemma": False}
"""Whether x / rms is rounded to x's dtype before it is multiplied by the weight."""


@names_wrong_types
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: str = "llama",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(weight + offset) * x / sqrt(mean(x^2) + eps)` of rows, with the roundings of transformers' models:
    fp32 inside.

    Parameters
    ----------
    x : Tensor, (..., features)
        fp32, bf16 or fp16.
    weight : Tensor, (features,)
        fp32, bf16 or fp16, maybe another dtype than x.
    eps : float
        Not negative.
    offset : float
        1 for Gemma, whose stored weights are the difference to 1.
    casting : str
        "llama": x / rms is rounded to x's dtype before it is multiplied by the weight, and the result has the
        promoted dtype of x and weight. "gemma": all in fp32, the result has x's dtype.
    dtype : torch.dtype, optional
        Dtype of the result: fp32 or x's; any of the three where x is fp32.

    Returns
    -------
    Tensor, like x, contiguous. Differentiable in x and weight. Saved for backward: both, and an fp32 value
    per row.

    Raises
    ------
    ValueError
        Shapes or devices that do not fit, dtypes that are not floating; a negative eps; another casting.
    """
    dtype = _result_dtype(x, x.dtype, weight, eps, casting, dtype)
    found = dispatch.call("rms_norm", x, weight, float(eps), float(offset), CASTING[casting], dtype)
    y: Tensor = found[0]
    return y


@names_wrong_types
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: str = "llama",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and this sum, in one pass, as between the two halves of a block.

    Parameters
    ----------
    x, residual : Tensor, (..., features)
        Of one shape; each fp32, bf16 or fp16.
    weight, eps, offset, casting, dtype
        As those of `rms_norm`, for an x that is the sum.

    Returns
    -------
    (normed, sum), both like x, contiguous; the sum has the promoted dtype of x and residual.
    Differentiable in x, residual and weight. Saved for backward: sum, weight, and an fp32 value per row.

    Raises
    ------
    ValueError
        As `rms_norm`.
    """
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    if not residual.dtype.is_floating_point:
        raise ValueError(f"residual: expected a floating dtype, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device} like x, got {residual.device}")
    total = torch.promote_types(x.dtype, residual.dtype)
    dtype = _result_dtype(x, total, weight, eps, casting, dtype)
    how = (float(eps), float(offset), CASTING[casting], dtype)
    y, summed, _ = dispatch.call("add_rms_norm", x, residual, weight, *how)
    return y, summed


def _result_dtype(
    x: Tensor, normed: torch.dtype, weight: Tensor, eps: float, casting: str, dtype: torch.dtype | None
) -> torch.dtype:
    """Dtype of the norm of a tensor of dtype `normed`, like x otherwise. Raises ValueError unless arguments
    fit."""
    if not x.dtype.is_floating_point or not weight.dtype.is_floating_point:
        name, wrong = ("weight", weight.dtype) if x.dtype.is_floating_point else ("x", x.dtype)
        raise ValueError(f"{name}: expected a floating dtype, got {wrong}")
    if weight.dim() != 1 or not weight.shape[0]:
        raise ValueError(f"weight: expected shape (features,), got {tuple(weight.shape)}")
    if not x.dim() or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x: expected shape (..., {weight.shape[0]}), got {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} like x, got {weight.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    if casting not in CASTING:
        raise ValueError(f"casting: expected one of {', '.join(CASTING)}, got {casting!r}")
    if dtype is None:
        return torch.promote_types(normed, weight.dtype) if CASTING[casting] else normed
    wide = accumulator_dtype(normed)
    if not dtype.is_floating_point or (normed != wide and dtype not in (normed, wide)):
        raise ValueError(f"dtype: expected {wide} or {normed} like x, got {dtype}")
    return dtype
