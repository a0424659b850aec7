"""Trainer with a bottleneck adapter, alone and with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flow_models as fm
import pytest
import torch
from peft_models import trained_values

import peft_kernels as pk

adapters = pk.adapters


def train(model: Any, folder: Path) -> list[float]:
    data = [{"input_ids": row, "labels": row} for row in fm.ids(rows=8)]
    found = fm.trainer(model, folder, 8, data, gradient_checkpointing=True, learning_rate=2e-2)
    found.train()
    return fm.logged(found)


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb"])
def test_trainer(base: str, tmp_path: Path) -> None:
    """The loss falls; saved and loaded into a new model it predicts the same."""
    model = fm.llama(base)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters.add(model, "task", "parallel" if base == "nf4" else "houlsby")
    adapters.train(model, "task")
    losses = train(model, tmp_path)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    adapters.save(model, "task", tmp_path / "task")
    fresh = fm.llama(base)
    adapters.load(fresh, tmp_path / "task")
    adapters.set_active(fresh, "task")
    with torch.no_grad():
        got, want = (m.eval()(input_ids=fm.ids(seed=9)).logits for m in (fresh, model))
    assert torch.equal(got, want)
    generated = [m.generate(fm.ids(rows=1), max_new_tokens=4, do_sample=False) for m in (fresh, model)]
    assert torch.equal(*generated)


def test_trainer_of_a_model_loaded_in_4_bits(tmp_path: Path) -> None:
    """transformers requires PEFT for quantised models, unless the model is marked as an ordinary one."""
    model = fm.bnb_llama(tmp_path / "base")
    adapters.add(model, "task")
    adapters.train(model, "task")
    with pytest.raises(ValueError, match="purely quantized models"):
        train(model, tmp_path)
    model.is_quantized = False
    losses = train(model, tmp_path)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses


def test_trainer_beside_lora(tmp_path: Path) -> None:
    model = fm.adapted(fm.llama("nf4"))
    adapters.add(model, "task")
    adapters.train(model, "task", freeze=False)
    before = trained_values(model)
    with pk.patched(model):
        losses = train(model, tmp_path)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses
    after = dict(model.named_parameters())
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert any("lora_B" in name for name in moved) and any("task.up" in name for name in moved)
