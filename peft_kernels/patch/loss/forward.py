"""The loss of a model of transformers without its logits, whatever the model does with them.

While a model computes a loss its head answers with logits that are not computed yet (`lazy_logits`); the
model goes on with these as with any, by its own code, and gives them back in its outputs.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...ops.arguments import is_traced
from .. import eligibility as judge
from ..fused import RECORD, Fused, Record, has
from ..lora.forward import FusedLora, prepare, rounded
from ..lora.linear4bit import FusedLinear4bit
from . import eligibility as judge_loss
from . import few_rows
from .lazy_logits import lazy_logits
from .recipe import Head, Seal


@dataclass
class LossFacts:
    """What is kept of a model whose loss is computed so."""

    reads: Counter[str] = field(default_factory=Counter)
    """Logits that were computed after all, by who read them."""

    def changed(self, model: nn.Module) -> str | None:
        """Why calls do not run so any more, or None."""
        late = [layer for layer in judge_loss.heads(model) if not has(layer, LazyHead)]
        return f"the head, a {type(late[0]).__name__}, has come after patch(); patch again" if late else None


class _Asked(threading.local):
    """The model that computes a loss on this thread."""

    record: Record | None = None
    seals: list[Seal] = []  # noqa: RUF012 - replaced before anything is added
    """Of the logits that it was given."""


_now = _Asked()


@contextmanager
def _asking(record: Record | None) -> Iterator[None]:
    before, _now.record, _now.seals = (_now.record, _now.seals), record, []
    try:
        yield
    finally:
        seals, (_now.record, _now.seals) = _now.seals, before
        for seal in seals:
            seal.close()


class LossModel(Fused):
    """A model that computes a loss from labels."""

    signed: ClassVar[bool] = True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward  # type: ignore[misc]
        record = self.__dict__.get(RECORD)
        if record is None or torch.compiler.is_compiling():
            return stock(*args, **kwargs)
        with _asking(record if judge_loss.asked(self, args, kwargs) else None):
            return stock(*args, **kwargs)


class LazyHead(Fused):
    """A layer that makes logits."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward  # type: ignore[misc]
        record = None if torch.compiler.is_compiling() else _now.record
        if record is None or RECORD not in self.__dict__:
            return stock(x, *args, **kwargs)
        logits = "extra arguments" if args or kwargs else _logits(self, x, record)
        if isinstance(logits, Tensor):
            return logits
        record.fallbacks[f"logits are computed for the loss, {logits}"] += 1
        with _asking(None):
            return stock(x, *args, **kwargs)


class LazyLinear(LazyHead):
    """One that runs by its own forward otherwise, but for a few rows without a gradient."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if _now.record is None and RECORD in self.__dict__ and not torch.compiler.is_compiling():
            found = None if args or kwargs else few_rows.logits(self, x)
            if found is not None:
                return found
        return super().forward(x, *args, **kwargs)


class LazyLinear4bit(LazyHead, FusedLinear4bit):
    """One of bitsandbytes."""


class LazyLora(LazyHead, FusedLora):
    """One with adapters of PEFT's."""


def head_mixin(layer: nn.Module) -> type[LazyHead]:
    """What to swap into a layer that makes logits."""
    if judge.is_lora(layer):
        return LazyLora
    return LazyLinear4bit if judge.is_linear4bit(layer) else LazyLinear


def _logits(layer: Any, x: Any, record: Record) -> Tensor | str:
    """Logits that are not computed yet, or why they must be."""
    if type(x) is not Tensor or torch._C._are_functorch_transforms_active() or is_traced():
        return f"hidden states are a {type(x).__name__}, or a transform of torch.func is at work"
    found: Any = _operands(layer, x)
    if isinstance(found, str):
        return found
    base, adapters = found
    if base.compute_dtype != base.dtype:
        return f"the head computes in {base.compute_dtype}, its input is in {base.dtype}"
    if len(adapters) > 1:
        return f"{len(adapters)} adapters of the head"
    parts: tuple[Any, ...] = ()
    for one in adapters:
        if one.dropout_p > 0:
            return "dropout before the adapter of the head"
        one = rounded(one, base.dtype)
        parts = one.lora_a, one.lora_b, one.scaling
    head = Head(x.to(base.dtype), base.weight, base.bias, *parts)
    seal = Seal(head)
    _now.seals.append(seal)
    return lazy_logits(head, base.out_dtype, seal, record.facts.reads)


def _operands(layer: Any, x: Tensor) -> Any:
    if not judge.is_lora(layer):
        base = judge.operands(layer, x.dtype, x.device, rounds_frozen=False)
        return base if isinstance(base, str) else (base, [])
    if layer.disable_adapters and layer.merged:
        return "adapters that are merged, and to be unmerged"
    found = prepare(layer, x.dtype, x.device)
    if found == "":  # PEFT's forward is the base layer's alone
        base = judge.base(layer.get_base_layer(), x.dtype, x.device)
        return base if isinstance(base, str) else (base, [])
    return found
