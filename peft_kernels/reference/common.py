"""What several references share."""

from __future__ import annotations

import torch
from torch import Tensor

from .nf4 import dequantize_nf4


def rows(t: Tensor) -> Tensor:
    """(..., features) as (rows, features); a vector is one row."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products are summed, and in which `h = x A^T` is kept: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_weight(
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The base weight of a linear op as a matrix, (out, in): dequantised to `dtype` when it is NF4."""
    if absmax is None:
        return weight
    return dequantize_nf4(weight, absmax, absmax2, offset, blocksize, shape, dtype)
