"""Small models with random weights for names on the hub, so that PEFT's tests run without it.

Tests that need tokenizers, adapters or trained weights from the hub still fail.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.auto_factory import _BaseAutoModelClass

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **{"vocab_size": 1000, "head_dim": 8, "d_kv": 8, "rotary_dim": 4, "moe_intermediate_size": 32},
    **{"intermediate_size_mlp": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "initializer_range": 0.1},
}

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "OPTForCausalLM",
    "peft-internal-testing/opt-125m": "OPTForCausalLM",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "peft-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "hf-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "trl-internal-testing/tiny-Llama4ForCausalLM": "Llama4ForCausalLM",
    "trl-internal-testing/tiny-GptOssForCausalLM": "GptOssForCausalLM",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "Gemma3ForCausalLM",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "MistralForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "Qwen3ForCausalLM",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "hf-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "GPTJForCausalLM",
    "peft-internal-testing/tiny-random-BloomForCausalLM": "BloomForCausalLM",
    "peft-internal-testing/tiny-random-t5": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": "BartForConditionalGeneration",
    "peft-internal-testing/tiny-random-BertModel": "BertModel",
    "peft-internal-testing/tiny-random-RobertaModel": "RobertaModel",
    "peft-internal-testing/tiny-random-BertForSequenceClassification": "BertForSequenceClassification",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": "RobertaForSequenceClassification",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
}
"""Names on the hub and their classes in transformers."""


def install(folder: Path) -> None:
    """Makes `from_pretrained` of models and configurations find them; they are made in `folder` on first
    use."""
    for owner in (_BaseAutoModelClass, transformers.PreTrainedModel, transformers.AutoConfig):
        owner.from_pretrained = classmethod(_found(owner.from_pretrained.__func__, folder))


def _found(from_pretrained: Any, folder: Path) -> Any:
    @functools.wraps(from_pretrained)
    def found(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if name in MODELS and hasattr(transformers, MODELS[name]):
            name = _made(MODELS[name], folder)
        return from_pretrained(cls, name, *args, **kwargs)

    return found


def _made(kind: str, folder: Path) -> str:
    place = folder / kind
    if not (place / "config.json").exists():
        cls = getattr(transformers, kind)
        known = cls.config_class().to_dict().keys() | cls.config_class.attribute_map.keys()
        options = {key: value for key, value in SIZES.items() if key in known}
        if "layer_types" in known:
            options["layer_types"] = cls.config_class().layer_types[:2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cls(cls.config_class(**options)).save_pretrained(place)
    return str(place)
