"""What logits come from, kept as long as they are not computed: what the head was given, and what a model did
to its product afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nf4.state import NF4State
from ..ops.linear import nf4_linear
from ..ops.lora import lora_linear

Step = Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """What the logits are the product of, as it was when the head was called."""

    hidden: Tensor
    weight: Any
    """Packed, or of hidden's dtype; a dense frozen one of fp32 counts as rounded to that."""
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        """What gradients may go to."""
        parts = self.hidden, self.weight, self.bias, self.lora_a, self.lora_b
        return [t for t in parts if isinstance(t, Tensor)]

    @property
    def versions(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in self.tensors]

    def detached(self, leaves: bool) -> Head:
        """`leaves`: of what had a gradient."""

        def part(t: Any) -> Any:
            return t.detach().requires_grad_(leaves and t.requires_grad) if isinstance(t, Tensor) else t

        return Head(*map(part, self))

    def product(self) -> Tensor:
        x, weight, bias, a, b, scaling = self
        if a is not None and b is not None:
            return lora_linear(x, weight, a, b, scaling, bias)
        if isinstance(weight, NF4State):
            return nf4_linear(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@dataclass(frozen=True)
class Recipe:
    """How logits come out of a head: by `steps`, one after the other. In `rows` they are inner * z, or with
    a cap outer * tanh(inner * z), of the head's z for these."""

    head: Head
    versions: list[int]
    rows: Tensor
    """(..., hidden_size): hidden, in the shape of the logits."""
    steps: tuple[Step, ...] = ()
    inner: float = 1.0
    outer: float | None = None

    def compute(self, head: Head) -> Tensor:
        with no_autocast(head.hidden):
            logits = head.product()
            for step in self.steps:
                logits = step(logits)
        return logits

    def check(self) -> None:
        if self.head.versions != self.versions:
            raise RuntimeError(
                "logits: expected to be read before the head's weights or the hidden states change, got a "
                "read after; read them sooner, or patch without loss=True"
            )


def of_head(head: Head) -> AbstractContextManager[Any]:
    """In which the loss computes with what the head has: autocast is on where the weight is to be rounded."""
    rounds = isinstance(head.weight, Tensor) and head.weight.dtype != head.hidden.dtype
    return torch.autocast(head.hidden.device.type, head.hidden.dtype if rounds else None, enabled=rounds)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(like.device.type, enabled=False)
