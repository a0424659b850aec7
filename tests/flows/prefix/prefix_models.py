"""Tiny models with PEFT's prefix tuning and a prefix that affects the output."""

from __future__ import annotations

from typing import Any

import bottleneck_models
import flow_models
import peft
import pytest
import torch
from installed import before
from torch import Tensor

TOKENS = 5
FAMILIES = ("llama", "gpt2", "t5", "bart")


def bare(family: str, base: str = "dense", **options: Any) -> Any:
    if family == "t5":  # PEFT assumes head_dim = d_model / num_heads
        options = {"d_kv": 16} | options
    if family == "gpt2":  # stock and ours draw other masks for attention's weights
        options = {"attn_pdrop": 0.0} | options
    return bottleneck_models.FAMILIES[family].make(base, **options)


def skip_encoder_decoder() -> None:
    """Skips where PEFT expects a method of encoder-decoders that transformers 5.23 has no more."""
    if before("peft", "0.21.2"):
        pytest.skip("PEFT before 0.21.2 makes no prefix and no prompt for encoder-decoders")


def prefixed(model: Any, projection: bool = False, **options: Any) -> Any:
    """A model in training mode, with the same large prefix in each call."""
    task = "CAUSAL_LM"
    if model.config.is_encoder_decoder:
        skip_encoder_decoder()
        task = "SEQ_2_SEQ_LM"
    torch.manual_seed(3)
    options = {
        "num_virtual_tokens": TOKENS,
        "prefix_projection": projection,
        "encoder_hidden_size": 24,
    } | options
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, **options))
    for parameter in model.prompt_encoder.parameters():
        parameter.data.mul_(2)
    return model.train()


def batch(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Two texts; the second is shorter."""
    ids = flow_models.ids(seed, rows=2, length=8, vocabulary=100)
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        mask[1, 5:] = 0
        labels = flow_models.ids(seed + 1, rows=2, length=6, vocabulary=100)
    else:
        mask[1, :3] = 0
        labels = ids.where(mask.bool(), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss(model: Any) -> Tensor:
    found: Tensor = model(**batch(model)).loss
    return found
