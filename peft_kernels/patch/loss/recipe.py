"""How to compute lazy logits: the operands of the head, and the steps of the model after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.fingerprint import bits_hash
from ...core.nf4_state import NF4State
from ...ops.arguments import no_autocast
from ...ops.linear import nf4_linear
from ...ops.lora.lora import lora_linear

Step = Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """The operands of the head when it was called."""

    hidden: Tensor
    weight: Any
    """Packed, or in hidden's dtype; a dense frozen fp32 weight is rounded to that."""
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        """The operands that may have gradients."""
        parts = self.hidden, self.weight, self.bias, self.lora_a, self.lora_b
        return [t for t in parts if isinstance(t, Tensor)]

    def detached(self, leaves: bool) -> Head:
        """`leaves`: require gradients where the operands did."""

        def part(t: Any) -> Any:
            return t.detach().requires_grad_(leaves and t.requires_grad) if isinstance(t, Tensor) else t

        return Head(*map(part, self))

    def logits(self) -> Tensor:
        x, weight, bias, a, b, scaling = self
        if a is not None and b is not None:
            return lora_linear(x, weight, a, b, scaling, bias)
        if isinstance(weight, NF4State):
            return nf4_linear(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Seal:
    """Checks that the operands of a head have the same bits as when its model returned.

    Version counters are not enough: fused optimizers, bitsandbytes, writes through `.data` or numpy, and
    FSDP2, which gathers weights again, do not change them. So the bits are hashed once for each forward.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._hashes: dict[str, Tensor | None] | None = None

    def close(self) -> None:
        """Called when the model's forward has returned. Nothing is checked before."""
        self._hashes = self._found()

    def check(self) -> None:
        """Raises RuntimeError if the logits would have other values now."""
        if self._hashes is None:
            return
        now = self._found()
        pairs = [(before, now.get(name)) for name, before in self._hashes.items()]
        if len(now) != len(pairs) or not all(
            a is not None and b is not None and torch.equal(a, b) for a, b in pairs
        ):
            raise RuntimeError(
                "logits: expected to be read before the head's weights or the hidden states change, got a "
                'read after; read them sooner, or patch with without="loss"'
            )

    def _found(self) -> dict[str, Tensor | None]:
        parts = {name: t for name, t in self._head._asdict().items() if isinstance(t, Tensor)}
        if isinstance(self._head.weight, NF4State):
            parts |= self._head.weight.tensors()
        with torch.no_grad():
            return {f"{name} {tuple(t.shape)} {t.dtype}": _hash(t) for name, t in parts.items()}


def _hash(t: Tensor) -> Tensor | None:
    """None for freed memory, as FSDP2 leaves it, and during CUDA graph capture: a replay has other values."""
    if t.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if t.numel() and not t.untyped_storage().nbytes():
        return None
    transposed = t.dim() == 2 and not t.is_contiguous()  # avoids a copy
    return bits_hash(t.t() if transposed else t)


@dataclass(frozen=True)
class Recipe:
    """How to compute logits from a head: by `steps`, in order. Each row is inner * z, or with a softcap outer
    * tanh(inner * z), where z is the head's output for that row."""

    head: Head
    seal: Seal
    steps: tuple[Step, ...] = ()
    row_steps: tuple[Step, ...] = ()
    """The same steps on hidden, (..., hidden_size); they select and reshape rows only."""
    inner: float = 1.0
    outer: float | None = None

    def rows(self, hidden: Tensor) -> Tensor:
        for step in self.row_steps:
            hidden = step(hidden)
        return hidden

    def compute(self, head: Head) -> Tensor:
        with no_autocast(head.hidden.device.type):
            logits = head.logits()
            for step in self.steps:
                logits = step(logits)
        return logits


def of_head(head: Head) -> AbstractContextManager[Any]:
    """A context in which the loss uses the head's operands: autocast is on if it must round the weight."""
    rounds = isinstance(head.weight, Tensor) and head.weight.dtype != head.hidden.dtype
    device = head.hidden.device.type
    return torch.autocast(device, head.hidden.dtype) if rounds and device != "meta" else no_autocast(device)
