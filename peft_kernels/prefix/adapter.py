"""Looks up an adapter of prefix tuning."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.wrong_types import an
from ..patch.rules.prefix import is_prefix_config


class PrefixAdapter(NamedTuple):
    name: str
    config: Any
    """A PrefixTuningConfig."""
    encoder: Any
    """A PrefixEncoder."""


def adapter_of(model: Any, name: str | None) -> PrefixAdapter:
    """An adapter by name, or the active one. Raises TypeError unless `model` is a PeftModel, ValueError if it
    has no such adapter of prefix tuning."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {an(model)}")
    name = model.active_adapter if name is None else name
    config = model.peft_config.get(name)
    if config is None:
        raise ValueError(f"adapter_name: expected one of {', '.join(model.peft_config)}, got {name}")
    if not is_prefix_config(config):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter_name: expected an adapter of prefix tuning, got {name} of {kind}")
    return PrefixAdapter(name, config, model.prompt_encoder[name])
