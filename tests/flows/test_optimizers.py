"""transformers' Trainer with this package's optimizers gives bitsandbytes' losses, also after a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flow_models import adapted, arguments, ids, llama

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

STEPS = 6
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01, "min_8bit_size": 256}


def trainer(model: Any, folder: Path, optimizer: Any, **options: Any) -> Any:
    rows = [{"input_ids": row, "labels": row} for i in range(4) for row in ids(i)]
    return transformers.Trainer(
        model=model,
        args=arguments(transformers.TrainingArguments, folder, **{"steps": STEPS} | options),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(optimizer, OPTIONS),
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_losses_equal_those_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    stock = adapted(llama("nf4"))
    model = copy.deepcopy(stock)
    pk.patch(model)
    ours = trainer(model, tmp_path / "ours", pk.optim.AdamW8bit)
    theirs = trainer(stock, tmp_path / "theirs", bnb.optim.AdamW8bit)
    for each in (ours, theirs):
        torch.manual_seed(0)
        each.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3) and len(losses(ours)) == STEPS
    states = ours.optimizer.state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW"])
def test_resume(name: str, tmp_path: Path) -> None:
    optimizer, model = getattr(pk.optim, name), adapted(llama("nf4"))
    again = copy.deepcopy(model)
    whole = trainer(model, tmp_path / "whole", optimizer)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(copy.deepcopy(again), tmp_path / "parts", optimizer, **saving).train()
    resumed = trainer(again, tmp_path / "parts", optimizer, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    want, got = weights(model), weights(again)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
