"""Norms, rotary embedding and residual sums in the layers of a patched model, on every back end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import tiny_llama
from peft_models import gradients, lora
from torch import Tensor

import peft_kernels as pk
import testing

pytestmark = pytest.mark.usefixtures("nan_outputs")

IDS = torch.tensor([[3, 17, 9, 40, 8], [5, 1, 77, 2, 100]])


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
        loss = model(input_ids=IDS, labels=IDS).loss
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
    assert got.keys() == plain.keys()
    floor = torch.finfo(torch.bfloat16).eps if autocast else 1e-5  # of a whole model
    for name, value in got.items():
        allowed = 2 * testing.relative_error(plain[name], truth[name]) + floor
        assert testing.relative_error(value, truth[name]) <= allowed, name


def test_a_token(backend: str) -> None:
    model = model_with_lora().eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        with pk.patched(model, without=("attention", "loss")):
            got = model(input_ids=IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
