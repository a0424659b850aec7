"""What the loss without logits asks of a model: is it one of transformers, and what are the layers that make
its logits."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

from torch import nn

from .. import eligibility as judge
from .. import fused


def takes_labels(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that computes a loss from labels and its head's logits."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or _labels_at(module) is None:
        return False
    return _head(module) is not None


def asked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of such a model is to compute its loss."""
    if "labels" in kwargs:
        return kwargs["labels"] is not None
    at = _labels_at(model)
    return at is not None and len(args) > at and args[at] is not None


def _labels_at(model: nn.Module) -> int | None:
    """Where the forward of a model takes labels, among its arguments."""
    cls: Any = fused.plain_class(model)
    return _place(cls)


@cache
def _place(cls: Any) -> int | None:
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _head(model: Any) -> nn.Module | None:
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # of models that have none, or lists of them
        return None
    return head


def heads(model: nn.Module) -> list[nn.Module]:
    """The layers that compute a model's logits: its head, or those that PEFT trains in place of one."""
    head: Any = _head(model)
    trained = getattr(head, "modules_to_save", None)
    if isinstance(trained, nn.ModuleDict):
        return [head.original_module, *trained.values()]
    return [head]


def head(layer: nn.Module, lora: type[fused.Fused]) -> str:
    """Why the logits of a layer would be computed whatever is asked, or "". `lora`: what stands in for a LoRA
    layer's forward."""
    replaced = fused.replaced(layer)
    if replaced is not None:
        return f"the head: {replaced}"
    if judge.is_lora(layer):
        return judge.lora_class(layer, lora) or judge.lora(layer, judge.active(layer), lora)
    if judge.linear(layer) in ("", judge.TRANSPOSED):
        return f"its head is a {type(layer).__name__}"
    return judge.unusable(layer) if judge.linear(layer) is judge.FOUR_BIT else ""
