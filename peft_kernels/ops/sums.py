"""Sums over rows: the gradients of biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.op import Op
from .common import accumulator_dtype, rows


class ColumnSums(Op):
    """Of x as rows of its last dimension, in the dtype of sums. For rows in 16 bits: what torch's sum gives,
    which on the CPU copies them to fp32 first."""

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
    """`ops`: of the namespace whose gradient it is."""
    acc = accumulator_dtype(dy.dtype)
    # torch's sum copies nothing of rows that have the dtype of sums already, and is the faster then.
    total: Tensor = rows(dy).sum(0) if dy.dtype == acc else ops.column_sums(dy)
    return total.to(dtype)
