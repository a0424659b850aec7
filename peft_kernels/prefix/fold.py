"""Replaces the reparametrisation of a prefix by its output."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .adapter import PrefixAdapter, adapter_of


@torch.no_grad()
def fold(model: Any, adapter_name: str | None = None) -> None:
    """Replaces the reparametrisation of a prefix (`prefix_projection=True`) by the plain prefix that it
    computes.

    In place, with the same logits: the MLP becomes an embedding of num_virtual_tokens x (2 * layers *
    token_dim) values. `save_pretrained` then writes an ordinary PEFT folder with `prefix_projection` false.
    The parameter is new: create the optimizer anew.

    Parameters
    ----------
    model : peft.PeftModel
        With prefix tuning; patched or not, trained or loaded.
    adapter_name : str, optional
        None: the active adapter.

    Raises
    ------
    TypeError
        `model` is not a PeftModel.
    ValueError
        No such adapter, one of another kind, or one without a projection.

    Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4.3.
    """
    from peft import PrefixEncoder

    adapter = adapter_of(model, adapter_name)
    if not adapter.config.prefix_projection:
        raise ValueError(f"adapter_name: expected an adapter with prefix_projection=True, got {adapter.name}")
    prefix = _prefix_of(adapter)
    config = dataclasses.replace(adapter.config, prefix_projection=False, encoder_hidden_size=None)
    with torch.device("meta"):
        encoder = PrefixEncoder(config)
    trained = any(parameter.requires_grad for parameter in adapter.encoder.parameters())
    encoder.embedding.weight = torch.nn.Parameter(prefix, requires_grad=trained)
    encoder.train(adapter.encoder.training)
    model.prompt_encoder[adapter.name] = encoder
    model.peft_config[adapter.name] = config


def _prefix_of(adapter: PrefixAdapter) -> torch.Tensor:
    """(num_virtual_tokens, 2 * layers * token_dim), in the encoder's dtype."""
    encoder = adapter.encoder
    if not hasattr(encoder, "transform"):  # loaded for inference: PEFT saves the MLP's output
        return encoder.embedding.weight.detach().clone()
    tokens = torch.arange(adapter.config.num_virtual_tokens, device=encoder.embedding.weight.device)
    return encoder(tokens).detach().clone()
