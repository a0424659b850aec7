"""The logits of a few rows, as generation asks for: a product that waits for the weight. Ours reads a dense
one at the speed of the memory (csrc/cpu/linear/linear_gemv_dense.inl), where torch's is far from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.arguments import is_traced
from ...ops.lora.multi_lora import AdaptedLinear, multi_lora_linear
from .. import eligibility as judge

FEW = 8
"""Rows. The op itself knows best which products are torch's: these are worth asking it."""


def logits(layer: Any, x: Any) -> Tensor | None:
    """Of a dense linear layer, without a gradient and on the CPU; None where its own forward is to compute
    them."""
    if torch.is_grad_enabled() or type(x) is not Tensor or x.device.type != "cpu" or not x.dim():
        return None
    if not 0 < x.numel() <= FEW * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._are_functorch_transforms_active() or is_traced():
        return None
    base = judge.operands(layer, x.dtype, x.device)
    if isinstance(base, str) or not isinstance(base.weight, Tensor) or base.weight.shape[1:] != x.shape[-1:]:
        return None
    return multi_lora_linear(x, [AdaptedLinear(base.weight, base.bias)])[0]
