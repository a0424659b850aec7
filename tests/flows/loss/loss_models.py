"""Tiny models with every way to compute logits, for the tests of the loss without logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import flow_families
import models
import peft
import peft_models
import torch
import transformers
from flow_checks import Calls
from flow_models import adapted, llama
from torch import Tensor

import peft_kernels as pk
import testing

VOCABULARY = 100


def family(name: str, **settings: Any) -> Any:
    """A model whose weights all train."""
    model = flow_families.tiny(name)
    for key, value in settings.items():
        setattr(model.config, key, value)
        if hasattr(model, key):  # Cohere stores it
            setattr(model, key, value)
    return model


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config).eval()


def with_head(kind: str) -> Any:
    """A Llama with LoRA, with a plain, trained, adapted or packed head."""
    model = llama(vocab_size=VOCABULARY, tie_word_embeddings=kind == "tied")
    if kind == "nf4":
        model.lm_head.weight.requires_grad_(False)
        pk.quantize_model(model, skip=())
    elif kind == "bnb":
        model.set_submodule("lm_head", models.to_linear4bit(model.lm_head))
        model.is_loaded_in_4bit = True
    layers = ["q_proj", "v_proj"] + ["lm_head"] * (kind in ("lora", "lora-nf4"))
    if kind == "lora-nf4":
        pk.quantize_model(model, skip=())
    saved = ["lm_head"] if kind == "saved" else None
    return adapted(model, target_modules=layers, modules_to_save=saved)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(vocab_size=VOCABULARY),
    "llama-tied": lambda: llama(vocab_size=VOCABULARY, tie_word_embeddings=True),
    "gemma2": lambda: family("gemma2", final_logit_softcapping=3.0),
    "cohere": lambda: family("cohere", logit_scale=0.25),
    "granite": lambda: family("granite", logits_scaling=8.0),
    "gpt2": lambda: family("gpt2"),
    "gptj": lambda: family("gptj"),
    "bert": lambda: family("bert"),
    "t5": t5,
    **{f"head-{kind}": lambda kind=kind: with_head(kind) for kind in
       ("frozen", "tied", "nf4", "bnb", "lora", "lora-nf4", "saved")},
}  # fmt: skip


def batch(rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    """Inputs and labels; some tokens have no label."""
    ids = torch.randint(
        3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1 + testing.SEED)
    )
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def disabled(model: Any) -> Any:
    """With adapters disabled, as in a reference model."""
    assert isinstance(model, peft.PeftModel)
    return model.disable_adapter()


BLOCK = ("qkv", "attention", "norms", "residuals")


def patched(stock: Any) -> tuple[Any, Any]:
    """With stock's blocks, so that logits that are read are stock's to the bit."""
    model = copy.deepcopy(stock)
    return model, pk.patch(model, BLOCK)


def losses_of(calls: Calls) -> int:
    return calls.counts["linear_cross_entropy"] + calls.counts["linear_cross_entropy_trained"]


def step(model: Any, given: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    return peft_models.step(model, lambda: model(**given, **more).loss)


def without_noise(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops gradients that are pure rounding error, such as those of key biases."""
    largest = max(float(t.norm()) for t in truth.values())
    return {n: t for n, t in results.items() if float(truth[n].norm()) > 1e-6 * largest}
