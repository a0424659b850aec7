"""transformers' Trainer with common options, patched against stock."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from flow_checks import Calls, Results, assert_fused, assert_near, assert_same_numbers
from flow_models import adapted, arguments, ids, in_fp64, llama, patched_copy

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

STEPS = 4
EVALUATION = {"dense": 1e-5, "nf4": 1e-5, "bnb": 0.02}
"""Bounds on the error in evaluation: bitsandbytes rounds its scales to bf16 on CPUs."""
BASES = pytest.mark.parametrize("base", ["dense", "nf4", "bnb"])


def data(count: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for i in range(count // 4) for row in ids(i)]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    return transformers.Trainer(
        model=model,
        args=arguments(transformers.TrainingArguments, folder, **{"steps": STEPS} | options),
        train_dataset=data(),
        eval_dataset=data(4),
    )


def history(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


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
        got = history(ours, key)
        assert len(got) == count and all(math.isfinite(value) for value in got)
        assert got == pytest.approx(history(stock, key), rel=rel, abs=rel), key


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "non-reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
}
if "activation_checkpointing" not in transformers.TrainingArguments.__dataclass_fields__:
    for options in OPTIONS.values():  # the names before transformers 5
        for old in [key for key in options if key.startswith("activation")]:
            options[old.replace("activation", "gradient")] = options.pop(old)


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
    ours, theirs = (trainer(each, tmp_path, **OPTIONS[case]) for each in (model, stock))
    assert_same_training(ours, theirs, 1e-3)
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
            one = trainer(each, tmp_path, bf16=bf16)
            one.train_dataset = [
                {"input_ids": row, "labels": row} for j in range(2) for row in ids(2 * i + j)
            ]
            one.train()
            found.append({key: torch.tensor(history(one, key)) for key in ("loss", "grad_norm")})
        assert_fused(model, report, blocks=2)
        ours, theirs, truth = found
        assert_near({"loss": ours["loss"]}, {"loss": theirs["loss"]}, 0.01)
        return ours, theirs, {key: value.double() for key, value in truth.items()}

    assert_same_numbers(sample, 0.02)


@BASES
def test_evaluation(base: str, tmp_path: Path) -> None:
    stock = adapted(llama(base), lora_dropout=0.2)
    model, report = patched_copy(stock)
    ours, theirs = (trainer(each, tmp_path) for each in (model, stock))
    first = [each.evaluate()["eval_loss"] for each in (ours, theirs)]
    assert first[0] == pytest.approx(first[1], rel=EVALUATION[base])
    logits = [torch.from_numpy(each.predict(data(4)).predictions) for each in (ours, theirs)]
    assert_near({"logits": logits[0]}, {"logits": logits[1]}, EVALUATION[base])
    assert_fused(model, report, blocks=2)


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    quiet, watched = adapted(llama("nf4")), adapted(llama("nf4"))
    for model in (quiet, watched):
        pk.patch(model)
    plain = trainer(quiet, tmp_path)
    with_evaluation = trainer(watched, tmp_path, eval_strategy="steps", eval_steps=1)
    for each in (plain, with_evaluation):
        each.train()
    assert len(history(with_evaluation, "eval_loss")) == STEPS
    assert history(plain) == history(with_evaluation)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_resume(base: str, tmp_path: Path) -> None:
    """Four steps equal two, a checkpoint, and two more with a new model."""
    whole = adapted(llama(base))
    pk.patch(whole)
    through = trainer(whole, tmp_path / "whole")
    through.train()

    begun = adapted(llama(base))
    pk.patch(begun)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(begun, tmp_path / "half", steps=2, **options).train()

    model = adapted(llama(base))
    report = pk.patch(model)
    resumed = trainer(model, tmp_path / "half", **options)
    with Calls() as calls:
        resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert calls.fused > 0
    assert history(resumed)[-2:] == pytest.approx(history(through)[-2:], rel=1e-5)
    assert_near(adapters(model), adapters(whole))
    assert_fused(model, report, blocks=2)


@BASES
def test_save_and_load(base: str, tmp_path: Path) -> None:
    """Stock and patched models load each other's files, which are the same."""
    stock = adapted(llama(base))
    model, _ = patched_copy(stock)
    for each, folder in ((model, "ours"), (stock, "stock")):
        trainer(each, tmp_path).save_model(str(tmp_path / folder))
    names = [sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in ("ours", "stock")]
    assert names[0] == names[1]
    weights = [(tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("ours", "stock")]
    assert weights[0] == weights[1]
    loaded = peft.PeftModel.from_pretrained(llama(base), tmp_path / "ours").eval()
    tokens = ids()
    want = stock.eval()(input_ids=tokens.clone()).logits
    assert_near({"logits": loaded(input_ids=tokens).logits}, {"logits": want}, EVALUATION[base])
    pk.patch(loaded)
    assert_near({"logits": loaded(input_ids=tokens).logits}, {"logits": want}, EVALUATION[base])


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
    ours, theirs = trainer(model, tmp_path, **options), trainer(eager, tmp_path)
    ours.train()
    theirs.train()
    assert history(ours) == pytest.approx(history(theirs), rel=1e-3)
    assert_fused(model, report, blocks=1)
