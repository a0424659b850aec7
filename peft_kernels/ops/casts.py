"""Casts of several tensors in one call, and sums of two dtypes, for which autocast needs many small calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch
from ..core.op import Op


class Cast(Op):
    """Copies tensors to another dtype in one call."""

    name = "cast"
    schema = "(Tensor[] x, ScalarType dtype) -> Tensor[]"
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> list[Tensor]:
        return [t.to(args.dtype, copy=True).contiguous() for t in args.x]

    @staticmethod
    def fake(args: Any) -> list[Tensor]:
        return [t.new_empty(t.shape, dtype=args.dtype) for t in args.x]

    differentiable = ("x",)
    saved_meta = ("x", "y")
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Sequence[Tensor | None]) -> dict[str, Any]:
        return {"x": [None if d is None else d.to(x.dtype) for d, x in zip(dy, args.x, strict=True)]}


class AddResidual(Op):
    """x + residual, rounded to their promoted dtype."""

    name = "add_residual"
    schema = "(Tensor x, Tensor residual) -> Tensor"
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        return (args.x + args.residual).contiguous()

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.x.new_empty(args.x.shape, dtype=torch.promote_types(args.x.dtype, args.residual.dtype))

    differentiable = ("x", "residual")
    saved_meta = ("x", "residual")
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        return {"x": dy.to(args.x.dtype), "residual": dy.to(args.residual.dtype)}


def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """`x + residual` of one shape, each fp32, bf16 or fp16. Faster than torch where the dtypes differ.

    Returns
    -------
    Tensor, like x, contiguous, of the promoted dtype. Differentiable.

    Raises
    ------
    ValueError
        Shapes or devices that differ, dtypes that are not floating.
    """
    for name, one in (("x", x), ("residual", residual)):
        if not one.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {one.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device} like x, got {residual.device}")
    y: Tensor = dispatch.call("add_residual", x, residual)
    return y
