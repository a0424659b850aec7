"""Finds the layers that compute the logits of a model of transformers."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from . import calls


def heads(model: Any) -> list[Any]:
    """The layers that compute the logits of a model of transformers: its head, or the copies of it that PEFT
    trains. None for another module, or a model with a list of heads."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return []
    try:
        head: Any = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    if not isinstance(head, nn.Module):
        return []
    trained = getattr(head, "modules_to_save", None)
    if isinstance(trained, nn.ModuleDict):
        return [head.original_module, *trained.values()]
    return [getattr(head, "token_adapter", head)]


def is_tokens(layer: Any) -> bool:
    """Whether this is a layer of which PEFT trains the rows of some tokens."""
    peft = sys.modules.get("peft.tuners.trainable_tokens")
    return peft is not None and isinstance(layer, peft.TrainableTokensLayer)


def device_reason(weight: Tensor) -> str:
    """Why the loss of a head with this weight is not computed without logits, or "". Heads may be trained."""
    ops = "linear_cross_entropy", "linear_cross_entropy_trained"
    return next(filter(None, (calls.device_reason(weight, op) for op in ops)), "")


def freed_reason(layer: nn.Module) -> str:
    """Why the weights of a layer are gone after its forward, or ""."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(layer, fsdp.FSDPModule):
        return "FSDP2 shards the head as a unit of its own; shard it with the root"
    return (
        "DeepSpeed shards the head; nothing to do"
        if any(hasattr(p, "ds_id") for p in layer.parameters())
        else ""
    )
