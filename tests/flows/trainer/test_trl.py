"""TRL's trainers for a few steps, patched against stock."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flow_checks import Calls, assert_fused, assert_near
from flow_models import adapted, arguments, config, ids, llama, patched_copy, tokenizer, words

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
import datasets
import trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 3
BASES = pytest.mark.parametrize("base", ["dense", "nf4", "bnb"])


def options(kind: Any, folder: Path, **more: Any) -> Any:
    return arguments(kind, folder, STEPS, **more)


def rows() -> list[torch.Tensor]:
    return [row for seed in range(3) for row in ids(seed)]


def completions() -> Any:
    return datasets.Dataset.from_list(
        [
            {"prompt": words(row[:3]), "completion": " " + words(row[3 : 6 + i % 4])}
            for i, row in enumerate(rows())
        ]
    )


def preferences() -> Any:
    return datasets.Dataset.from_list(
        [
            {"prompt": words(row[:3]), "chosen": " " + words(row[3:6]), "rejected": " " + words(row[6:])}
            for row in rows()
        ]
    )


def labelled() -> Any:
    return datasets.Dataset.from_list(
        [
            {"prompt": words(row[:3]), "completion": " " + words(row[3:7]), "label": i % 2 == 0}
            for i, row in enumerate(rows())
        ]
    )


def in_fp32(trainer: Any) -> Any:
    """Casts adapters to fp32: TRL makes those of a 4-bit model bf16, where one rounding changes the
    samples."""
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return trainer


def history(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_training(ours: Any, stock: Any, rel: float = 0.01, keys: tuple[str, ...] = ()) -> None:
    torch.manual_seed(0)
    with Calls() as calls:
        ours.train()
    assert calls.counts["gated_mlp"] >= 2 * STEPS, calls.counts
    torch.manual_seed(0)
    with Calls() as calls:
        stock.train()
    assert calls.fused == 0, "the stock side must be stock"
    for key in ("loss", "grad_norm", *keys):
        got = history(ours, key)
        assert len(got) == STEPS and all(math.isfinite(value) for value in got), (key, got)
        assert got == pytest.approx(history(stock, key), rel=rel, abs=rel), key


@BASES
def test_sft(base: str, tmp_path: Path) -> None:
    stock = adapted(llama(base))
    model, report = patched_copy(stock)

    def trainer(model: Any) -> Any:
        return trl.SFTTrainer(
            model=model,
            args=options(trl.SFTConfig, tmp_path, max_length=16),
            train_dataset=completions(),
            processing_class=tokenizer(),
        )

    assert_same_training(in_fp32(trainer(model)), in_fp32(trainer(stock)), 1e-3)
    assert_fused(model, report, blocks=2)


@BASES
def test_sft_with_peft_config(base: str, tmp_path: Path) -> None:
    """The trainer gets the base model and a peft_config; the model is patched after its construction."""

    def trainer() -> Any:
        torch.manual_seed(3)
        return trl.SFTTrainer(
            model=llama(base),
            args=options(trl.SFTConfig, tmp_path, max_length=16),
            train_dataset=completions(),
            processing_class=tokenizer(),
            peft_config=config(),
        )

    ours, stock = trainer(), trainer()
    adapters = [{n: p for n, p in each.model.named_parameters() if p.requires_grad} for each in (ours, stock)]
    assert_near(*adapters)
    report = pk.patch(ours.model)
    assert_same_training(in_fp32(ours), in_fp32(stock), 1e-3)
    assert_fused(ours.model, report, blocks=2)


@pytest.mark.parametrize("made_by", ["user", "trainer"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dpo(base: str, made_by: str, tmp_path: Path) -> None:
    def trainer(model: Any, peft_config: Any = None) -> Any:
        torch.manual_seed(3)
        return trl.DPOTrainer(
            model=model,
            args=options(trl.DPOConfig, tmp_path, max_length=16, beta=0.05),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            peft_config=peft_config,
        )

    if made_by == "user":
        stock = adapted(llama(base))
        model, report = patched_copy(stock)
        ours, theirs = trainer(model), trainer(stock)
    else:
        ours, theirs = (trainer(llama(base), config()) for _ in range(2))
        report = pk.patch(ours.model)
    assert_same_training(ours, theirs, keys=("rewards/margins", "logps/chosen", "logps/rejected"))
    assert_fused(ours.model, report, blocks=2)


def kto() -> tuple[Any, Any]:
    """KTOTrainer and its configuration, wherever this TRL defines them."""
    if hasattr(trl, "KTOTrainer"):
        return trl.KTOTrainer, trl.KTOConfig
    module = pytest.importorskip("trl.experimental.kto", reason="this TRL has no KTOTrainer")
    return module.KTOTrainer, module.KTOConfig


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_kto(base: str, tmp_path: Path) -> None:
    kind, settings = kto()

    def trainer() -> Any:
        torch.manual_seed(3)
        return kind(
            model=llama(base),
            args=options(settings, tmp_path, max_length=16),
            train_dataset=labelled(),
            processing_class=tokenizer(),
            peft_config=config(),
        )

    ours, theirs = trainer(), trainer()
    report = pk.patch(ours.model)
    assert_same_training(ours, theirs)
    assert_fused(ours.model, report, blocks=2)


def rewards(completions: list[str], **_: Any) -> list[float]:
    """Rewards that differ among completions, as GRPO needs."""
    return [sum(int(word[1:]) for word in text.split() if word.startswith("w")) / 100 for text in completions]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_grpo(base: str, tmp_path: Path) -> None:
    def trainer() -> Any:
        torch.manual_seed(3)
        model = adapted(llama(base))
        made = trl.GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=options(
                trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=4, beta=0.01,
                learning_rate=1e-4,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": words(row[:4])} for row in rows()]),
            processing_class=tokenizer(),
        )  # fmt: skip
        return in_fp32(made)

    ours, theirs = trainer(), trainer()
    report = pk.patch(ours.model)
    assert_same_training(ours, theirs, keys=("reward", "completions/mean_length"))
    assert_fused(ours.model, report, blocks=2)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_reward(base: str, tmp_path: Path) -> None:
    """A scalar head that trains beside the adapters; quantize_model leaves it dense."""

    def trainer() -> Any:
        language = llama("dense")
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**language.config.to_dict() | {"num_labels": 1})
        )
        model.model.load_state_dict(language.model.state_dict())
        torch.manual_seed(4)
        torch.nn.init.normal_(model.score.weight, std=0.2)
        if base == "nf4":
            pk.quantize_model(model)
        assert type(model.score) is torch.nn.Linear
        torch.manual_seed(3)
        return trl.RewardTrainer(
            model=model,
            args=options(trl.RewardConfig, tmp_path, max_length=16, bf16=base == "nf4"),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            peft_config=config(task_type="SEQ_CLS"),
        )

    ours, theirs = trainer(), trainer()
    assert any("score" in name for name, p in ours.model.named_parameters() if p.requires_grad)
    report = pk.patch(ours.model)
    # The loss is of a difference of two rewards, each rounded to bf16.
    assert_same_training(ours, theirs, 0.05 if base == "nf4" else 1e-3)
    assert_fused(ours.model, report, blocks=2)
