"""The logits of a few rows, as in generation: a GEMM bound by reading the weight. Our kernel reads a dense
one at memory bandwidth (csrc/cpu/linear/linear_gemv_dense.inl); torch's is far slower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.arguments import is_traced
from ...ops.lora.multi_lora import AdaptedLinear, multi_lora_linear
from ..fused import Fallback
from ..input_spec import input_spec
from ..rules.linear import fused_operands

_MAX_ROWS = 8
"""The op may still choose torch's GEMM below this."""


def logits(layer: Any, x: Any) -> Tensor | None:
    """The output of a dense linear layer on the CPU, without a gradient; None if its own forward must run."""
    if torch.is_grad_enabled() or type(x) is not Tensor or x.device.type != "cpu" or not x.dim():
        return None
    if not 0 < x.numel() <= _MAX_ROWS * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._are_functorch_transforms_active() or is_traced():
        return None
    base = fused_operands(layer, input_spec(x.dtype, x.device))
    if isinstance(base, Fallback) or not isinstance(base.weight, Tensor):
        return None
    if base.weight.shape[1:] != x.shape[-1:]:
        return None
    return multi_lora_linear(x, [AdaptedLinear(base.weight, base.bias)])[0]
