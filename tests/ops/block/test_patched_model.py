"""Norms, rotary embedding and residual sums in the layers of a patched model, on every back end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import tiny_llama
from peft_models import gradients, lora
from rounding import ONE_MODEL, assert_close_together, relative_error
from torch import Tensor

import peft_kernels as pk
import testing

pytestmark = pytest.mark.usefixtures("nan_outputs")


def batch() -> Tensor:
    return torch.randint(3, 100, (2, 5), generator=torch.Generator().manual_seed(testing.SEED))


def model_with_lora() -> Any:
    """Trained are the adapters and the norms' weights."""
    model = lora(tiny_llama(hidden_size=32, intermediate_size=48), target_modules="all-linear", r=4)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + testing.tensor(len(parameter), seed=len(name), scale=0.2)
            parameter.requires_grad_(True)
    return model.train()


def step(model: Any, autocast: bool) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=batch(), labels=batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_training_step(backend: str, autocast: bool, op_counts: Counter[str]) -> None:
    model = model_with_lora()
    plain = step(model, autocast)
    truth = step(model.double(), False)
    model.float()
    with pk.patched(model, without=("attention", "loss")) as report:
        op_counts.clear()
        got = step(model, autocast)
    assert op_counts["rotary"] == op_counts["add_rms_norm"] == 2 and op_counts["rms_norm"] == 3
    assert not any(entry.reason or entry.fallbacks for entry in report.blocks), str(report)
    assert_close_together(got, plain, truth)


def test_a_token(backend: str) -> None:
    model = model_with_lora().eval()
    with torch.no_grad():
        want = model(input_ids=batch()).logits
        with pk.patched(model, without=("attention", "loss")):
            got = model(input_ids=batch()).logits
    assert relative_error(got, want) <= ONE_MODEL
