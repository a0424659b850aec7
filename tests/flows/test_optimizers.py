"""transformers' Trainer with this package's optimizers gives bitsandbytes' losses, also after a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import adapted, llama, logged, rows_of, trainer
from installed import before
from peft_models import trained_values
from rounding import CURVE

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

STEPS = 6
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01, "min_8bit_size": 256}


def trained_by(optimizer: Any, model: Any, folder: Path, **more: Any) -> Any:
    given = {"optimizer_cls_and_kwargs": (optimizer, OPTIONS)}
    return trainer(model, folder, STEPS, rows_of(4), given, **more)


def test_losses_equal_those_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if before("bitsandbytes", "0.50"):
        pytest.skip("bitsandbytes before 0.50 has no 8-bit optimizers on CPUs")
    stock = adapted(llama("nf4"))
    model = copy.deepcopy(stock)
    pk.patch(model)
    ours = trained_by(pk.optim.AdamW8bit, model, tmp_path / "ours")
    theirs = trained_by(bnb.optim.AdamW8bit, stock, tmp_path / "theirs")
    for each in (ours, theirs):
        torch.manual_seed(0)
        each.train()
    assert logged(ours) == pytest.approx(logged(theirs), rel=CURVE) and len(logged(ours)) == STEPS
    states = ours.optimizer.state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW"])
def test_resume(name: str, tmp_path: Path) -> None:
    """A patched model that is loaded in place, also into its cached calls."""
    optimizer, model = getattr(pk.optim, name), adapted(llama("nf4"))
    pk.patch(model)
    again = copy.deepcopy(model)
    whole = trained_by(optimizer, model, tmp_path / "whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trained_by(optimizer, copy.deepcopy(again), tmp_path / "parts", **saving).train()
    resumed = trained_by(optimizer, again, tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    want, got = trained_values(model), trained_values(again)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert logged(resumed)[-3:] == logged(whole)[-3:]
