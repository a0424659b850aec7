"""Small models of many families, patched, and one training step."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from flow_checks import step
from flow_models import ids
from torch import Tensor, nn

import peft_kernels as pk

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


FURTHER: dict[str, dict[str, Any]] = {
    "Gemma2": {"attn_logit_softcapping": 5.0}, "SmolLM3": {"no_rope_layers": [1, 0], "eos_token_id": 1}
}  # fmt: skip


def family(name: str, **options: Any) -> Any:
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**SIZES | FURTHER.get(name, {}) | options)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def patched(stock: nn.Module, **options: Any) -> tuple[Any, Any]:
    model = copy.deepcopy(stock)
    return model, pk.patch(model, **options)


def between(report: Any, kind: str) -> list[Any]:
    return [entry for entry in report.blocks if entry.kind.startswith(kind)]


def one_step(model: Any, **more: Any) -> dict[str, Tensor]:
    return step(model, lambda m: m(input_ids=ids(), labels=ids(), **more).loss)
