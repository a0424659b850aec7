"""Finds models of transformers that compute a loss from labels, and the layers that compute their logits."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

from torch import Tensor, nn

from .. import eligibility
from ..eligibility import TRANSPOSED, layer_reason, linear_kind
from ..fused import plain_class, replaced_reason
from ..lora.eligibility import is_lora
from ..lora.forward import lora_reason


def takes_labels(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that computes a loss from labels and its head's logits."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or _labels_at(module) is None:
        return False
    return _head(module) is not None


def computes_loss(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of such a model computes the loss."""
    if "labels" in kwargs:
        return kwargs["labels"] is not None
    at = _labels_at(model)
    return at is not None and len(args) > at and args[at] is not None


def _labels_at(model: nn.Module) -> int | None:
    """The position of `labels` among the arguments of a model's forward."""
    cls: Any = plain_class(model)
    return _labels_position(cls)


@cache
def _labels_position(cls: Any) -> int | None:
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _head(model: Any) -> nn.Module | None:
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # models without a head, or with a list of heads
        return None
    return head


def heads(model: nn.Module) -> list[nn.Module]:
    """The layers that compute a model's logits: its head, or the copies of it that PEFT trains."""
    head: Any = _head(model)
    trained = getattr(head, "modules_to_save", None)
    if isinstance(trained, nn.ModuleDict):
        return [head.original_module, *trained.values()]
    return [head]


def device_reason(weight: Tensor) -> str:
    """Why the loss of a head with this weight is not computed without logits, or "". Heads may be trained."""
    ops = "linear_cross_entropy", "linear_cross_entropy_trained"
    return next(filter(None, (eligibility.device_reason(weight, op) for op in ops)), "")


def head_reason(layer: nn.Module) -> str:
    """Why the logits of a layer are computed in any case, or ""."""
    weight = next(layer.parameters(), None)
    if weight is not None and (reason := device_reason(weight)):
        return reason
    if reason := replaced_reason(layer):
        return f"the head: {reason}"
    if is_lora(layer):
        return lora_reason(layer)
    if linear_kind(layer) in ("", TRANSPOSED):
        return f"its head is a {type(layer).__name__}"
    return layer_reason(layer)
