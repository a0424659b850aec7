"""Tiny checkpoints and how to load them, for the tests of transformers' quantiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from installed import before
from moe_models import qwen_moe
from torch import Tensor, nn

import peft_kernels as pk
import testing

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if before("transformers", "5.23"):
    pytest.skip("NF4Config needs transformers 5.23", allow_module_level=True)
from peft_kernels.integrations.transformers import NF4Config, read_config  # noqa: E402

Auto = transformers.AutoModelForCausalLM


def llama(**options: Any) -> Any:
    return models.tiny_llama(**{"intermediate_size": 128, "initializer_range": 0.2} | options)


def gpt2(**options: Any) -> Any:
    """With Conv1D, biases and a head tied to the embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes | {"bos_token_id": 1, "eos_token_id": 2} | options)
    return transformers.GPT2LMHeadModel(config)


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, num_labels=3)
    return transformers.BertForSequenceClassification(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "classifier": classifier,
    "moe": qwen_moe,
}


def saved(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, shards: str = "50GB"
) -> Path:
    """A dense checkpoint."""
    MODELS[kind]().to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def auto(kind: str) -> Any:
    return transformers.AutoModelForSequenceClassification if kind == "classifier" else Auto


def loaded(folder: Path, kind: str = "llama", **options: Any) -> Any:
    """Loads a dense checkpoint, quantising it."""
    config = NF4Config(**options.pop("nf4", {}))
    return auto(kind).from_pretrained(folder, quantization_config=config, **options)


def read(folder: Path, kind: str = "llama", **options: Any) -> Any:
    """Loads a checkpoint in 4 bits without bitsandbytes."""
    return auto(kind).from_pretrained(folder, config=read_config(folder), **options)


def bnb_config(**options: Any) -> Any:
    """The configuration that tutorials use."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    usual = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    compute = {"bnb_4bit_compute_dtype": torch.bfloat16}
    return transformers.BitsAndBytesConfig(**{"load_in_4bit": True, **usual, **compute} | options)


def ids(rows: int = 2, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1 + testing.SEED)
    return torch.randint(3, 60, (rows, length), generator=generator)


def logits(model: Any) -> Tensor:
    with torch.enable_grad():  # without gradients bitsandbytes repacks its weights on a CPU
        return model(input_ids=ids()).logits.detach().float()


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """Same keys, equal bits."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    different = [key for key in first if not same_bits(first[key], second[key])]
    assert not different


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also of NaN, which tables of scales have."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (each.contiguous().view(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def nf4_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, pk.nn.NF4Linear)}
