"""Grouped GEMMs of dense experts by torch, which reads on the device which rows belong to which expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.gradient import AutogradFunction

MOST_EXPERTS = 1023
CARDS = ((9, 0), (10, 0)) if torch.__version__ >= "2.11" else ((9, 0),)
"""Compute capabilities for which `torch._grouped_mm` has a kernel. On others it waits for the device, and on
10.3 it calls a kernel that is not compiled for it (torch 2.11). experts_plan.cpp has the same rule."""


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies rows of x, (rows, in), by a weight (experts, out, in) without waiting for the
    device."""
    return (
        _on_card(x)
        and x.dtype == weight.dtype == torch.bfloat16
        and x.shape[0] > 0
        and 0 < weight.shape[0] <= MOST_EXPERTS
        and has_vectors(weight)
    )


def has_vectors(weight: Tensor) -> bool:
    """Whether rows, or columns, of the weights and of the results start at multiples of 16 bytes."""
    (n, k), (step, rows, columns) = weight.shape[1:], weight.stride()
    by_rows, by_columns = columns == 1 and rows >= k, rows == 1 and columns >= n
    sizes = n, k, step, rows if by_rows else columns
    return (by_rows or by_columns) and all(i % 8 == 0 for i in (*sizes, weight.storage_offset()))


def grouped_linear(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies rows ends[e - 1] to ends[e] of x by weight[e].T and adds bias[e]. Rows behind the last end
    give zeros.

    Parameters
    ----------
    x : Tensor, (rows, in)
        bf16.
    ends : Tensor, (experts,), int32
        Ascending, from 0 to `rows` at most.
    weight : Tensor, (experts, out, in)
        bf16, one that `has_kernel`. Frozen.
    bias : Tensor, (experts, out), optional
        bf16. Frozen.

    Returns
    -------
    Tensor, (rows, out), bf16. Differentiable in x.
    """
    y: Tensor = _GroupedLinear.apply(x, ends, weight)
    if bias is None:
        return y
    padded = torch.cat([bias, bias.new_zeros((1, bias.shape[1]))])
    return y + padded[_expert_of_row(ends, x.shape[0])]


class _GroupedLinear(AutogradFunction):
    @staticmethod
    def forward(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
        return _product(x, ends, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ends, weight = ctx.saved_tensors
        return _product(grads[0], ends, weight), None, None


def _product(rows: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    rows = rows.contiguous()
    if rows.storage_offset() % 8:
        rows = rows.clone()
    y: Tensor = torch._grouped_mm(rows, weight, offs=ends)
    rest = torch.arange(y.shape[0], device=y.device) >= ends[-1]
    return y.masked_fill_(rest[:, None], 0)  # torch leaves these as its memory was


def _expert_of_row(ends: Tensor, rows: int) -> Tensor:
    """The number of experts for rows of none."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


def _on_card(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) in CARDS
