"""transformers' Trainer with common options, patched against stock."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_checks import Calls, Results, assert_fused, assert_near, assert_same_numbers
from flow_models import adapted, in_fp64, llama, logged, patched_copy, rows_of, trainer
from rounding import BF16, CURVE

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

STEPS = 4


def four_steps(model: Any, folder: Path, **options: Any) -> Any:
    return trainer(model, folder, STEPS, given={"eval_dataset": rows_of(1)}, **options)


def assert_same_training(ours: Any, stock: Any, rel: float, count: int = STEPS, **train: Any) -> None:
    """Trains both; the logged values of each step must agree."""
    torch.manual_seed(0)
    with Calls() as calls:
        ours.train(**train)
    dora = any("magnitude" in name for name, _ in ours.model.named_parameters())
    assert calls.counts["dora_norm" if dora else "gated_mlp"] >= 2 * count, calls.counts
    torch.manual_seed(0)
    with Calls() as calls:
        stock.train(**train)
    assert calls.fused == 0, "the stock side must be stock"
    for key in ("loss", "grad_norm"):
        got = logged(ours, key)
        assert len(got) == count and all(math.isfinite(value) for value in got)
        assert got == pytest.approx(logged(stock, key), rel=rel, abs=rel), key


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    **{
        name: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": value}}
        for name, value in (("reentrant", True), ("non-reentrant", False))
    },
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
}


CASES = [
    *(
        (case, base, "lora")
        for case in ("plain", "reentrant", "non-reentrant")
        for base in ("dense", "nf4", "bnb")
    ),
    *((case, "nf4", "lora") for case in ("accumulation", "label-smoothing", "neftune")),
    *((case, base, "dora") for case in ("reentrant", "non-reentrant") for base in ("dense", "nf4")),
]


@pytest.mark.parametrize("case,base,adapter", CASES, ids=map("-".join, CASES))
def test_options(case: str, base: str, adapter: str, tmp_path: Path) -> None:
    stock = adapted(llama(base), use_dora=adapter == "dora")
    model, report = patched_copy(stock)
    ours, theirs = (four_steps(each, tmp_path, **OPTIONS[case]) for each in (model, stock))
    assert_same_training(ours, theirs, CURVE)
    if adapter == "lora":
        assert_fused(model, report, blocks=2)


def test_autocast(tmp_path: Path) -> None:
    """By the numbers policy: bf16 results that round at different places differ more from each other than
    from the truth."""

    def sample(i: int) -> tuple[Results, Results, Results]:
        stock = adapted(llama("nf4"))
        model, report = patched_copy(stock)
        found = []
        for each, bf16 in ((model, True), (stock, True), (in_fp64(stock), False)):
            one = trainer(each, tmp_path, STEPS, rows_of(2 * i + 2)[8 * i :], bf16=bf16)
            one.train()
            found.append({key: torch.tensor(logged(one, key)) for key in ("loss", "grad_norm")})
        assert_fused(model, report, blocks=2)
        ours, theirs, truth = found
        assert_near({"loss": ours["loss"]}, {"loss": theirs["loss"]}, BF16)
        return ours, theirs, {key: value.double() for key, value in truth.items()}

    assert_same_numbers(sample, 2 * BF16)


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    quiet, watched = adapted(llama("nf4")), adapted(llama("nf4"))
    for model in (quiet, watched):
        pk.patch(model)
    plain = four_steps(quiet, tmp_path)
    with_evaluation = four_steps(watched, tmp_path, eval_strategy="steps", eval_steps=1)
    for each in (plain, with_evaluation):
        each.train()
    assert len(logged(with_evaluation, "eval_loss")) == STEPS
    assert logged(plain) == logged(with_evaluation)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled(tmp_path: Path) -> None:
    stock = adapted(llama("nf4", num_hidden_layers=1))
    model, report = patched_copy(stock)
    eager = copy.deepcopy(stock)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    ours, theirs = four_steps(model, tmp_path, **options), four_steps(eager, tmp_path)
    ours.train()
    theirs.train()
    assert logged(ours) == pytest.approx(logged(theirs), rel=CURVE)
    assert_fused(model, report, blocks=1)
