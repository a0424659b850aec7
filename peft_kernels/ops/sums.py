"""Sums over rows, for the gradients of biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.op import Op
from .common import accumulator_dtype, rows


class ColumnSums(Op):
    """Sums x over all but its last dimension, in the accumulator dtype. For 16-bit x: torch's sum first
    copies it to fp32 on the CPU."""

    name = "column_sums"
    schema = "(Tensor x) -> Tensor"
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        return rows(args.x).sum(0, dtype=accumulator_dtype(args.x.dtype))

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.x.new_empty(args.x.shape[-1:], dtype=accumulator_dtype(args.x.dtype))

    differentiable = ("x",)
    saved_meta = ("x",)
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        return {"x": dy.to(args.x.dtype).expand(args.x.shape)}


def bias_grad(ops: Any, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of a bias in `dtype`. `ops`: the namespace to call."""
    acc = accumulator_dtype(dy.dtype)
    # For rows in the accumulator dtype torch's sum makes no copy, and is faster.
    total: Tensor = rows(dy).sum(0) if dy.dtype == acc else ops.column_sums(dy)
    return total.to(dtype)
