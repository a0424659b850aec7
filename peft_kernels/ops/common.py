"""Helpers of the references and gradients of several ops."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(t: Tensor) -> Tensor:
    """(..., features) as (rows, features); a vector is one row."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulation and of `h = x A^T`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_h(x: Tensor, rank: int) -> Tensor:
    """Uninitialised x A^T."""
    return x.new_empty((*x.shape[:-1], rank), dtype=accumulator_dtype(x.dtype))


def empty_unless(need: bool, like: Tensor) -> Tensor:
    """An uninitialised gradient, without elements where it is not needed."""
    return like.new_empty(like.shape if need else (0,))


def weight_grad(dy: Tensor, x: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """Gradient of a dense base weight, which only the base GEMM contributes to."""
    dtype = compute_dtype or x.dtype
    return rows(dy).to(dtype).t() @ rows(x).to(dtype)
