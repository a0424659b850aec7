"""Models of transformers whose head returns logits that are not computed yet (`lazy_logits`).

The model's own code, the trainer, or a loss function uses these like other logits.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.arguments import is_traced
from ...ops.loss.head import Head
from .. import small_calls
from ..fused import RECORD, Fallback, Fused, Record, has, record_of, replaced_reason
from ..input_spec import input_spec
from ..lora.forward import FusedLora, adapted_operands, lora_reason, rounded
from ..lora.linear4bit import FusedLinear4bit
from ..rules import loss as rule
from ..rules.examination import Examination, Layers
from ..rules.linear import fused_operands
from ..rules.linear4bit import is_linear4bit
from ..rules.linear_kind import TRANSPOSED, layer_reason, linear_kind
from ..rules.lora import is_lora
from ..rules.loss import is_tokens
from . import few_rows, trl_head
from .lazy_logits import lazy_logits
from .recipe import HeadCall


@dataclass
class LossFacts:
    """State of a model whose loss is computed without logits."""

    reads: Counter[str] = field(default_factory=Counter)
    """How often the logits were materialised, by the function that did it."""

    def change_reason(self, model: nn.Module) -> str:
        """Why calls no longer run without logits, or ""."""
        late = [layer for layer in rule.heads(model) if not has(layer, LazyHead)]
        return f"the head, a {type(late[0]).__name__}, was added after patch(); patch again" if late else ""


class LossModel(Fused):
    """A model with such a head."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "forward" and RECORD in self.__dict__ and trl_head.is_added(value):
            value = trl_head.around(self, value)
        super().__setattr__(name, value)


class LazyHead(Fused):
    """A layer that computes logits."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward  # type: ignore[misc]
        own = self.__dict__.get(RECORD)
        record = None if own is None or torch.compiler.is_compiling() else own.of_model
        if record is None or _is_read_at_once(self, x):
            return stock(x, *args, **kwargs)
        logits = (
            Fallback("extra arguments; call it without them") if args or kwargs else _logits(self, x, record)
        )
        if isinstance(logits, Tensor):
            return logits
        record.fallbacks[f"logits are computed for the loss, {logits.reason}"] += 1
        return stock(x, *args, **kwargs)


class LazyLinear(LazyHead):
    """A head that otherwise runs its own forward, except for a few rows without a gradient."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if RECORD in self.__dict__ and not torch.compiler.is_compiling():
            found = None if args or kwargs else few_rows.logits(self, x)
            if found is not None:
                return found
        return super().forward(x, *args, **kwargs)


class LazyTokens(LazyHead):
    """A head of which PEFT trains the rows of some tokens."""


class LazyLinear4bit(LazyHead, FusedLinear4bit):
    """A head of bitsandbytes."""


class LazyLora(LazyHead, FusedLora):
    """A head with PEFT adapters."""


def head_mixin(layer: nn.Module) -> type[LazyHead]:
    """The class to install in a layer that computes logits."""
    if is_lora(layer):
        return LazyLora
    if is_tokens(layer):
        return LazyTokens
    return LazyLinear4bit if is_linear4bit(layer) else LazyLinear


def examine(module: nn.Module, layers: Layers) -> Examination | None:
    """Examines a model that computes logits."""
    heads = rule.heads(module)
    if not heads:
        return None
    reasons = [_head_reason(layer) for layer in heads]
    if any(record_of(layer) is not None and not has(layer, LazyHead) for layer in heads):
        reasons.append("its head was patched without the loss; unpatch first")
    reason = next((reason for reason in reasons if reason), "")
    return Examination.of("loss without logits,", module, LossModel, reason, LossFacts())


def _head_reason(layer: nn.Module) -> str:
    """Why the logits of a layer are computed in any case, or ""."""
    weight = next(layer.parameters(), None)
    if weight is not None and (reason := rule.device_reason(weight)):
        return reason
    if reason := replaced_reason(layer):
        return f"the head: {reason}"
    if is_lora(layer):
        return lora_reason(layer)
    layer = layer.base_layer if is_tokens(layer) else layer  # type: ignore[assignment]
    if linear_kind(layer) in ("", TRANSPOSED):
        return f"its head is a {type(layer).__name__}; nothing to do"
    return layer_reason(layer)


def _is_read_at_once(layer: Any, x: Any) -> bool:
    """Whether there are few logits, those of one token of each sequence, as in generation, or those of merged
    adapters, which PEFT takes out of the weight again through `.data`."""
    if not isinstance(x, Tensor) or not x.dim():
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    # PEFT 0.18 nests wrappers of heads, which have no such attribute: the fallback says so.
    columns = getattr(getattr(layer, "base_layer", layer), "out_features", math.inf)
    few = rows * columns < small_calls.FEW_LOGITS
    merged = bool(getattr(layer, "merged", False))
    return few or merged or not (torch.is_grad_enabled() or x.shape[-2:-1] != (1,))


def _logits(layer: Any, x: Any, record: Record) -> Tensor | Fallback:
    """Logits that are not computed yet."""
    if type(x) is not Tensor or torch._C._are_functorch_transforms_active() or is_traced():
        return Fallback(
            f"hidden states are a {type(x).__name__}, or a transform of torch.func is active; nothing to do"
        )
    if reason := rule.freed_reason(layer):
        return Fallback(reason)
    operands: Any = _operands(layer, x)
    if isinstance(operands, Fallback):
        return operands
    base, adapters = operands
    if base.compute_dtype != base.dtype:
        return Fallback(
            f"the head computes in {base.compute_dtype}, its input is in {base.dtype}; use one dtype"
        )
    if len(adapters) > 1:
        return Fallback(f"{len(adapters)} adapters of the head; activate one")
    parts: tuple[Any, ...] = ()
    for one in adapters:
        if one.dropout_p > 0:
            return Fallback("dropout before the adapter of the head; set lora_dropout to 0")
        one = rounded(one, base.dtype)
        parts = one.lora_a, one.lora_b, one.scaling
    head = Head(x.to(base.dtype), base.weight, base.bias, *parts)
    return lazy_logits(HeadCall(head, layer), base.out_dtype, record.facts.reads)


def _operands(layer: Any, x: Tensor) -> Any:
    spec = input_spec(x.dtype, x.device)
    if is_lora(layer):
        if layer.disable_adapters and layer.merged:
            return Fallback("adapters that are merged, and to be unmerged; unmerge them first")
        found = adapted_operands(layer, spec)
        if found != Fallback():
            return found
        base = fused_operands(layer.get_base_layer(), spec, called=False)  # PEFT runs it alone
    elif is_tokens(layer):
        base = _with_tokens(layer, spec)
    else:
        base = fused_operands(layer, spec, rounds_frozen=False)
    return base if isinstance(base, Fallback) else (base, [])


def _with_tokens(layer: Any, spec: Any) -> Any:
    """The base layer with the trained rows, as PEFT computes it."""
    base = fused_operands(layer.base_layer, spec, called=False)
    active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
    if layer.disable_adapters and layer.merged:
        return Fallback("adapters that are merged, and to be unmerged; unmerge them first")
    if isinstance(base, Fallback) or not active:
        return base
    if len(active) > 1 or base.bias is not None:
        return Fallback(
            "several adapters of the head's tokens, or its bias, which PEFT leaves out; nothing to do"
        )
    return base._replace(weight=layer.get_merged_weights(active).to(base.dtype))
