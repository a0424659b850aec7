"""Decides whether a model has prefixes of PEFT, and whether it can generate and be checkpointed with them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from ..fused import Fused, has

_FLAG = "gradient_checkpointing"


def is_prefix(module: nn.Module) -> bool:
    """Whether a module is a PeftModel with a prefix tuning adapter."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(module, PeftModel) and any(map(is_prefix_config, module.peft_config.values()))


def is_active(model: Any) -> bool:
    """Whether the active adapter of a PeftModel is of prefix tuning."""
    return is_prefix_config(model.active_peft_config)


def is_prefix_config(config: Any) -> bool:
    """Whether an adapter config is of prefix tuning."""
    from peft import PeftType

    return bool(config.peft_type == PeftType.PREFIX_TUNING)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that transformers recomputes under gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    yield from ((n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))


def stacks(model: nn.Module) -> Iterator[nn.Module]:
    """The models inside that have a flag for gradient checkpointing."""
    from transformers import PreTrainedModel

    yield from (m for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, _FLAG))


def recomputes(layer: Any) -> bool:
    """Whether a call of this layer would be recomputed in the backward pass."""
    return bool(getattr(layer, _FLAG, False) and layer.training and torch.is_grad_enabled())


def not_recomputable(model: Any) -> str:
    """Why the layers of a PeftModel lose its prefix under gradient checkpointing, or ""."""
    base = model.get_base_model()
    if not getattr(base, "supports_gradient_checkpointing", True):
        return f"transformers has none for {type(base).__name__}; nothing to do"
    if not any(layers(base)):
        name = type(base).__name__
        return f"the layers of {name} are no GradientCheckpointingLayer of transformers; nothing to do"
    lost = next((layer for _, layer in layers(base) if index_in_cache(layer) is None), None)
    if lost is not None:
        return f"nothing in {type(lost).__name__} tells which layer of a cache is its own; nothing to do"
    shared = getattr(base.config, "num_kv_shared_layers", 0)
    return (
        f"{shared} layers of {type(base).__name__} take keys and values from others; nothing to do"
        if shared
        else ""
    )


def index_in_cache(layer: nn.Module) -> int | None:
    """The index of a decoder layer's entry in a cache."""
    named = (getattr(m, name, None) for m in layer.modules() for name in ("layer_idx", "layer_id"))
    return next((index for index in named if isinstance(index, int)), None)


def checkpointing(model: Any, ours: type[Fused]) -> bool:
    """Whether a call of a PeftModel would recompute its layers.

    Raises RuntimeError if that would lose the prefix: transformers removes the cache from layers that are not
    of class `ours`.
    """
    base = model.get_base_model()
    if not any(map(recomputes, base.modules())):
        return False
    if reason := not_recomputable(model):
        raise RuntimeError(f"prefix tuning: no gradient checkpointing here, {reason}")
    late = next((n for n, layer in layers(base) if recomputes(layer) and not has(layer, ours)), None)
    if late is not None:
        raise RuntimeError(f"prefix tuning: {late} was added after patch(); patch again to checkpoint it")
    return True


@cache
def takes_cache() -> bool:
    """Whether this transformers passes the KV cache of generate as `cache`. PEFT still sets
    `past_key_values`, so the prefix would be lost."""
    from transformers import GenerationMixin

    return "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
