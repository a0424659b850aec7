"""Small causal models, and folders of adapters for them as PEFT writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor

import peft_kernels as pk
import testing

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

# Ranks, scalings and layers differ; "dora" is DoRA.
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 8, "lora_alpha": 16},
    "two": {
        "r": 3, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"up_proj": 9},
    },
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),  # Conv1D with biases
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),  # biases in the attention
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 4, "attn_implementation": "eager"}),
}
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_COMMON = {
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def llama(base: str = "dense", dtype: torch.dtype = torch.float32) -> Any:
    model = models.tiny_llama(initializer_range=0.2, pad_token_id=0).to(dtype).eval()
    return models.to_base(model, base)


def family(name: str) -> Any:
    kind, sizes = FAMILIES[name]
    sizes = (_SIZES if name != "gpt2" else {}) | sizes | _COMMON
    torch.manual_seed(0)
    model = getattr(transformers, kind + "LMHeadModel" if name == "gpt2" else kind + "ForCausalLM")
    return model(getattr(transformers, kind + "Config")(**sizes)).eval()


def small(kind: str, config: str = "", **sizes: Any) -> Any:
    """A causal model of a class, with a config of common sizes."""
    torch.manual_seed(0)
    found = getattr(transformers, config or f"{kind}Config")(**_SIZES | _COMMON | sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(found).eval()


def save_adapter(model: Any, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Saves a new adapter on a copy of the model."""
    defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**defaults | options))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(testing.tensor(*parameter.shape, seed=1000 * seed + number, scale=0.2))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * testing.tensor(*parameter.shape, seed=number, scale=1.0))
    adapted.save_pretrained(folder)
    return folder


def save_bottleneck(model: Any, folder: Path, kind: str) -> Path:
    pk.adapters.add(model, kind, kind)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if f"adapters.{kind}." in name:
                parameter.copy_(testing.tensor(*parameter.shape, seed=seed, scale=0.3))
    pk.adapters.save(model, kind, folder)
    return folder


def save_adapters(model: Any, folder: Path) -> dict[str, Path]:
    return {
        name: save_adapter(model, folder / name, seed, **options)
        for seed, (name, options) in enumerate(ADAPTERS.items())
    }


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


ACROSS_LAYERS = ("mlp", "qkv", "attention", "norms", "residuals", "loss")
"""What engines do not fuse: they compute layer by layer."""


def by_generate(
    model: Any, ids: list[int], new: int, folder: Path | None = None
) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and their logits of `generate` on one request, with PEFT's adapter, patched."""
    model = copy.deepcopy(model)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        pk.patch(model, without=ACROSS_LAYERS)
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return found.sequences[0, len(ids) :].tolist(), [logits[0] for logits in found.logits]
