"""transformers' Trainer with models that compute the loss without logits, against stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow_checks import Calls
from flow_models import logged, trainer
from loss_models import MODELS, VOCABULARY, batch, losses_of, patched
from rounding import BF16, CURVE, ONE_MODEL
from torch import Tensor

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def on_rows(model: Any, folder: Path, given: dict[str, Any], **options: Any) -> Any:
    given = given | {"eval_dataset": list(map(row, range(8, 12)))}
    return trainer(model, folder, 4, list(map(row, range(8))), given, **options)


def row(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (10,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.where(torch.arange(10) > seed % 4, -100)}


def custom_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "smoothing": {"label_smoothing_factor": 0.1},
    "own-loss": {},
    "autocast": {"bf16": True},
}

CASES = [
    ("head-saved", "plain"), ("gemma2", "accumulation"), ("head-frozen", "checkpointing"),
    ("head-frozen", "smoothing"), ("gemma2", "own-loss"), ("head-saved", "autocast"),
    ("llama", "autocast"),
]  # fmt: skip


@pytest.mark.parametrize("name,run", CASES, ids=map("-".join, CASES))
def test_trainer(name: str, run: str, tmp_path: Path) -> None:
    stock = MODELS[name]().train()
    model, report = patched(stock)
    histories = []
    for each in (model, stock):
        each.config.use_cache = False
        own_loss = {"compute_loss_func": custom_loss} if run == "own-loss" else {}
        one = on_rows(each, tmp_path, own_loss, **RUNS[run])
        with Calls() as calls:
            one.train()
        histories.append(logged(one) + logged(one, "grad_norm"))
        if each is model and run != "smoothing":
            assert losses_of(calls) >= 4
    assert len(histories[0]) == 8
    assert histories[0] == pytest.approx(histories[1], rel=2 * BF16 if run == "autocast" else CURVE)
    assert not report.losses[0].fallbacks and report.losses[0].fused, str(report)
    assert ("x by " in report.losses[0].note) == (run == "smoothing"), "Trainer's smoothing reads the logits"


def test_a_model_that_accelerate_has_wrapped() -> None:
    """The head is the same, whichever forward accelerate wraps."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    # Shared by all of a process: another test may have chosen another precision.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for first in ("patch", "prepare"):
        model = MODELS["llama"]()
        report = pk.patch(model) if first == "patch" else None
        accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        report = report or pk.patch(model)
        with Calls() as calls:
            model(**batch()).loss.backward()
        assert losses_of(calls) == 1 and report.losses[0].reason == ""


def test_trainer_evaluates(tmp_path: Path) -> None:
    """Metrics read the logits; prediction_loss_only does not."""
    stock = MODELS["head-frozen"]()
    model, report = patched(stock)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"highest": float(prediction.predictions.argmax(-1).mean())}

    ours, theirs = (
        on_rows(each, tmp_path, {"compute_metrics": metrics}).evaluate() for each in (model, stock)
    )
    for key in ("eval_loss", "eval_highest"):
        assert ours[key] == pytest.approx(theirs[key], rel=ONE_MODEL)
    assert abs(seen[0] - seen[1]).max() < ONE_MODEL * max(1.0, abs(seen[1]).max())
    reads = report.losses[0].record.facts.reads.total()
    assert reads
    on_rows(model, tmp_path, {}, prediction_loss_only=True).evaluate()
    assert report.losses[0].record.facts.reads.total() == reads
