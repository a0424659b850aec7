"""Dropout of attention weights in patched models: ours draws the mask."""

from __future__ import annotations

import bottleneck_models as bm
import models
import pytest
import torch
from peft_models import gradients
from torch import Tensor

import peft_kernels as pk
from peft_kernels.patch.block import attend


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_dropout(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Masks are drawn from torch's generator, in training only, and again for recomputed layers."""
    model = models.tiny_llama(attention_dropout=0.1) if name == "llama" else bm.FAMILIES[name].make()
    given = {"input_ids": torch.arange(42).view(2, 21)}
    drawn: list[float] = []
    op = attend.attention
    monkeypatch.setattr(attend, "attention", lambda *args: drawn.append(args[6]) or op(*args))
    pk.patch(model)

    def step(seed: int, train: bool = True) -> dict[str, Tensor]:
        model.train(train).zero_grad()
        torch.manual_seed(seed)
        out = model(**given)[0]
        out.float().square().mean().backward()
        return {"out": out.detach(), **gradients(model)}

    want = step(1)
    others = step(2)["out"], step(1, train=False)["out"]
    count = len(drawn) // 3
    assert count and drawn == [0.1] * 2 * count + [0.0] * count
    assert not any(torch.equal(want["out"], other) for other in others)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(1)
    assert all(torch.equal(again[name], want[name]) for name in want)
