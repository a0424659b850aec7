"""The head of a language model with its input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.op import Base
from ...core.packed_state import HoldsPacked, PackedState
from .. import arguments
from ..arguments import Weight
from ..linear import nf4_linear
from ..lora.lora import check_adapter, lora_linear


@dataclass
class Head:
    """A language model's head with its input, as in `linear_cross_entropy`: hidden (..., hidden_size), weight
    (vocabulary, hidden_size), bias (vocabulary,), lora_a (r, hidden_size), lora_b (vocabulary, r)."""

    hidden: Tensor
    weight: Weight
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The operands that may have gradients."""
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def detached(self, leaves: bool) -> Head:
        """`leaves`: require gradients where the operands did."""
        parts: Any = {
            n: t.detach().requires_grad_(leaves and t.requires_grad) for n, t in self.tensors.items()
        }
        return replace(self, **parts)

    def rounded(self) -> Head:
        """With a dense weight of hidden's dtype."""
        weight = self.weight
        return replace(self, weight=weight.to(self.hidden.dtype)) if isinstance(weight, Tensor) else self

    def output(self) -> Tensor:
        """What the layer returns, (..., vocabulary), before logit_scale and softcap; a dense weight and the
        bias are rounded to hidden's dtype."""
        x, weight, bias = self.hidden, self.weight, self.bias
        if self.lora_a is not None and self.lora_b is not None:
            return lora_linear(x, weight, self.lora_a, self.lora_b, self.scaling, bias)
        if isinstance(weight, (HoldsPacked, PackedState)):
            return nf4_linear(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def checked(self) -> tuple[Head, tuple[int, int], Base]:
        """The head as autocast rounds it, the shape of its weight, and the weight as ops take it. Raises
        ValueError for operands that do not fit.

        A dense fp32 weight is not rounded, as ops do it."""
        head, dtype = self, arguments.autocast_dtype(self.hidden.device.type)
        of_weight: Any = None
        if dtype is not None and self.hidden.is_floating_point() and self.hidden.dtype != torch.float64:
            weight: Any = self.weight
            if not isinstance(weight, (HoldsPacked, PackedState)):
                of_weight = torch.float32 if weight.dtype == torch.float32 else None
                weight = weight if of_weight else weight.to(dtype)
            a, b = (t if t is None else t.to(dtype) for t in (self.lora_a, self.lora_b))
            head = replace(self, hidden=self.hidden.to(dtype), weight=weight, lora_a=a, lora_b=b)
        compute = arguments.compute_type(head.hidden, None, "hidden")
        shape, base = arguments.base_weight(head.hidden, head.weight, of_weight or compute, name="hidden")
        arguments.check_bias(head.hidden, head.bias, shape[0], compute, "hidden")
        if (self.lora_a is None) != (self.lora_b is None):
            missing, other = ("lora_a", "lora_b") if self.lora_a is None else ("lora_b", "lora_a")
            raise ValueError(f"{missing}: expected a Tensor with {other}, got None")
        if head.lora_a is not None and head.lora_b is not None:
            check_adapter(head.hidden, shape, head.lora_a, head.lora_b, 0.0)
        if not 0 < (1 if self.softcap is None else self.softcap) < math.inf:
            raise ValueError(f"softcap: expected more than 0, or None, got {self.softcap}")
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale: expected a finite number, got {self.logit_scale}")
        return head, shape, base
