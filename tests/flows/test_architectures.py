"""Every causal language model of transformers that can be made tiny, encoders, seq2seq and a vision model,
with LoRA on NF4 and DoRA on dense weights: outputs and gradients, patched against stock."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

import flow_families
import pytest
import torch
import transformers
from flow_checks import (
    Calls,
    assert_near,
    assert_same_numbers,
    block_fallbacks,
    fused_blocks,
    fused_layers,
    layer_fallbacks,
    lora_layers,
)
from flow_models import adapted, ids, in_fp64
from installed import before
from peft_models import gradients
from rounding import FAR, ONE_STEP
from torch import Tensor

import peft_kernels as pk
import testing

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SMALL | {"intermediate_size": 64, "max_position_embeddings": 66, "initializer_range": 0.2}
OTHERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config,
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    ),
    "bart-seq2seq": (
        "BartForConditionalGeneration",
        transformers.BartConfig,
        {"vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.2}
        | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1}
        | {"eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2},
    ),
    "bert-mlm": ("BertForMaskedLM", transformers.BertConfig, BERT),
    "bert-classifier": ("BertForSequenceClassification", transformers.BertConfig, BERT),
    "roberta-mlm": ("RobertaForMaskedLM", transformers.RobertaConfig, BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        transformers.DistilBertConfig,
        {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        | {"max_position_embeddings": 64, "initializer_range": 0.2},
    ),
    "vit": (
        "ViTForImageClassification",
        transformers.ViTConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        | {"image_size": 16, "patch_size": 8, "initializer_range": 0.2},
    ),
}

NO_TRUTH = {"xglm"}
if before("transformers", "5.10"):
    NO_TRUTH |= {"hunyuan_v1_moe", "mvp", "phimoe", "trocr"}
"""Families that do not run in fp64, or compute something else in it, and are compared with stock."""


def expected(model: Any, report: Any, dora: bool, reached: Collection[str]) -> int:
    """The minimum number of fused ops in a forward; `reached`: parameters that get a gradient."""
    adapters = [name.partition(".lora_B")[0] for name in reached if ".lora_B" in name]
    layers = fused_layers(report) & lora_layers(model) & set(adapters)
    if dora:
        return len(layers)
    ops = set()  # a layer's own, or that of its block
    for name in layers:
        block, _, own = name.rpartition(".")
        together = fused_blocks(report) if own != "o_proj" else ()
        if own in ("q_proj", "k_proj", "v_proj"):
            together = fused_blocks(report, "attention")
        ops.add(block if block in together else name)
    return len(ops)


@lru_cache(maxsize=1)
def plain(name: str) -> Any:
    if name not in OTHERS:
        return flow_families.tiny(name)
    head, kind, options = OTHERS[name]
    torch.manual_seed(0)
    return getattr(transformers, head)(kind(**options)).eval()


SEQ2SEQ = ("t5", "bart-seq2seq")
ROUTERS = {"ergo", "llama4_text", "phimoe"}
"""Families whose routers are linear layers with a forward of their own: most return a tuple, where no adapter
works."""
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Families in which PEFT refuses an adapter on `out_proj`."""


def targets(model: Any, dora: bool) -> Any:
    if model.config.model_type in MAMBA:
        return r".*\.(in_proj|x_proj|up_proj|down_proj|q_proj)"
    if (dora and hasattr(model.config, "num_experts_per_tok")) or model.config.model_type in ROUTERS:
        # No DoRA on experts in one parameter.
        ends = "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "in_proj", "kv_proj"
        linear = (n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        return [n for n in linear if n.rpartition(".")[2] in ends]  # Zaya's qkv_proj is made of others
    return "all-linear"


def batch(name: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    tokens = ids(seed, rows=2, length=5, vocabulary=100)
    if name == "vit":
        return {"pixel_values": testing.tensor(2, 3, 16, 16, seed=seed).to(dtype)}
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :4]} if name in SEQ2SEQ else {})


def results(name: str, model: Any, seed: int) -> dict[str, Tensor]:
    model.zero_grad()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    logits = model(**batch(name, dtype, seed)).logits
    logits.backward(testing.tensor(*logits.shape, seed=9).to(logits.dtype))
    return {"logits": logits.detach(), **gradients(model)}


def cases() -> Iterator[tuple[str, str, str]]:
    """The family determines what is packed and fused. DoRA needs the same as LoRA, so some families and one
    with Conv1D suffice; LoRA on dense and DoRA on NF4 weights are tested elsewhere."""
    for i, name in enumerate([*OTHERS, *flow_families.families()]):
        yield name, "nf4", "lora"
        if name in OTHERS or name == "gpt2" or i % 3 == 0:
            yield name, "dense", "dora"


@pytest.mark.parametrize("name,base,adapter", cases())
def test_patched_as_stock(name: str, base: str, adapter: str) -> None:
    model, dora = copy.deepcopy(plain(name)), adapter == "dora"
    if base == "nf4":
        pk.quantize_model(model)
        packed = sum(isinstance(p, pk.NF4Weight) for p in model.parameters())
        assert packed, "quantize_model has packed nothing"
    model = adapted(model, use_dora=dora, r=4, lora_alpha=8, target_modules=targets(model, dora)).eval()
    double = in_fp64(model)
    if hasattr(double.get_base_model(), "set_experts_implementation"):
        double.get_base_model().set_experts_implementation("eager")  # the others do not run in fp64
    reports = []

    def sample(seed: int) -> Any:
        stock = results(name, model, seed)
        truth = stock if name in NO_TRUTH else results(name, double, seed)
        with pk.patched(model) as report, Calls() as calls:
            got = results(name, model, seed)
        ran = calls.counts["dora_norm"] if dora else calls.fused
        assert ran >= expected(model, report, dora, stock), (ran, report.details())
        reports.append(report)
        if name in NO_TRUTH:
            assert_near(got, stock, ONE_STEP)
            return stock, stock, truth
        return got, stock, truth

    assert_same_numbers(sample, FAR)
    report = reports[0]
    assert not lora_layers(model) - fused_layers(report), str(report)
    assert not layer_fallbacks(report), str(report)
    assert all(dora and "DoRA" in reason for reason in block_fallbacks(report)), str(report)
