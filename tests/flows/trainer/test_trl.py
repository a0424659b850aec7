"""TRL's trainers for a few steps, patched against stock."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from flow_checks import Calls, assert_fused, assert_near
from flow_models import (
    adapted,
    arguments,
    config,
    ids,
    in_fp32,
    llama,
    logged,
    patched_copy,
    tokenizer,
    words,
)
from installed import before
from peft_models import trained_values
from rounding import BF16, CURVE

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
import datasets
import trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 3
ROWS = [row for seed in range(3) for row in ids(seed)]
COMPLETIONS = [
    {"prompt": words(row[:3]), "completion": " " + words(row[3 : 6 + i % 4])} for i, row in enumerate(ROWS)
]
PREFERENCES = [
    {"prompt": words(row[:3]), "chosen": " " + words(row[3:6]), "rejected": " " + words(row[6:])}
    for row in ROWS
]
LABELLED = [
    {"prompt": words(row[:3]), "completion": " " + words(row[3:7]), "label": i % 2 == 0}
    for i, row in enumerate(ROWS)
]


def rewards(completions: list[str], **_: Any) -> list[float]:
    """Rewards that differ among completions, as GRPO needs."""
    return [sum(int(word[1:]) for word in text.split() if word.startswith("w")) / 100 for text in completions]


class Kind(NamedTuple):
    """A trainer, the bound on the difference of logged values, and further keys of them."""

    name: str
    data: list[dict[str, Any]]
    options: dict[str, Any]
    rel: float = 0.01
    keys: tuple[str, ...] = ()
    given: dict[str, Any] | None = None
    in_fp32: bool = False
    has_head: bool = False
    """Whether TRL adds its head, which is then fused."""

    def make(self, model: Any, folder: Path, peft_config: Any = None) -> Any:
        module: Any = trl
        if not hasattr(trl, f"{self.name}Trainer"):
            module = pytest.importorskip(
                f"trl.experimental.{self.name.lower()}", reason=f"this TRL has no {self.name}Trainer"
            )
        settings = getattr(module, f"{self.name}Config")
        if missing := self.options.keys() - settings.__dataclass_fields__.keys():
            pytest.skip(f"this TRL's {settings.__name__} has no {', '.join(sorted(missing))}")
        torch.manual_seed(3)
        made = getattr(module, f"{self.name}Trainer")(
            model=model,
            args=arguments(settings, folder, STEPS, **self.options),
            train_dataset=datasets.Dataset.from_list(self.data),
            processing_class=tokenizer(),
            peft_config=peft_config,
            **self.given or {},
        )
        return in_fp32(made) if self.in_fp32 else made


SHORT = {"max_length": 16}
LONG = SHORT | {"remove_unused_columns": False}
PROMPTS = [{"prompt": words(row[:4])} for row in ROWS]
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.01, "learning_rate": 1e-4}
POLICY: dict[str, Any] = {
    "keys": ("reward", "completions/mean_length", "entropy"), "given": {"reward_funcs": rewards},
    "in_fp32": True, "has_head": True,
}  # fmt: skip
KINDS = {
    "sft": Kind("SFT", COMPLETIONS, SHORT, 1e-3, in_fp32=True),
    "dpo": Kind(
        "DPO", PREFERENCES, SHORT | {"beta": 0.05},
        keys=("rewards/margins", "logps/chosen", "logps/rejected"), in_fp32=True,
    ),
    "orpo": Kind("ORPO", PREFERENCES, LONG, keys=("rewards/margins", "nll_loss"), in_fp32=True),
    "cpo": Kind("CPO", PREFERENCES, LONG | {"cpo_alpha": 0.5}, keys=("rewards/margins",), in_fp32=True),
    "simpo": Kind(
        "CPO", PREFERENCES, LONG | {"loss_type": "simpo", "cpo_alpha": 0.0}, keys=("rewards/margins",),
        in_fp32=True,
    ),
    "kto": Kind("KTO", LABELLED, SHORT, in_fp32=True, has_head=True),
    "grpo": Kind("GRPO", PROMPTS, SAMPLED, **POLICY),
    "grpo-entropy": Kind(
        "GRPO", PROMPTS,
        SAMPLED | {
            "entropy_coef": 0.1, "top_entropy_quantile": 0.5, "loss_type": "bnpo", "temperature": 0.8,
            "importance_sampling_level": "sequence",
        },
        **POLICY,
    ),
    "rloo": Kind("RLOO", PROMPTS, SAMPLED, **POLICY),
}  # fmt: skip
CASES = [
    *(("sft", base, by) for base in ("dense", "nf4", "bnb") for by in ("user", "trainer")),
    *(("dpo", base, by) for base in ("dense", "nf4") for by in ("user", "trainer")),
    *((name, base, "trainer") for name in ("kto", "rloo") for base in ("dense", "nf4")),
    *((name, "dense", "trainer") for name in ("orpo", "cpo", "simpo", "grpo-entropy")),
    *(("grpo", base, "user") for base in ("dense", "nf4")),
]
"""Trainers, bases, and who creates the adapter: the user, or the trainer from a peft_config."""


def assert_same_training(ours: Any, stock: Any, rel: float, keys: tuple[str, ...] = ()) -> None:
    torch.manual_seed(0)
    with Calls() as calls:
        ours.train()
    assert calls.counts["gated_mlp"] >= 2 * STEPS, calls.counts
    torch.manual_seed(0)
    with Calls() as calls:
        stock.train()
    assert calls.fused == 0, "the stock side must be stock"
    for key in ("loss", "grad_norm", *keys):
        got = logged(ours, key)
        assert len(got) == STEPS and all(math.isfinite(value) for value in got), (key, got)
        assert got == pytest.approx(logged(stock, key), rel=rel, abs=rel), key


@pytest.mark.parametrize("name,base,made_by", CASES, ids=map("-".join, CASES))
def test_trainer(name: str, base: str, made_by: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    if made_by == "user":
        stock = adapted(llama(base))
        model, report = patched_copy(stock)
        ours, theirs = (kind.make(each, tmp_path) for each in (model, stock))
    else:
        ours, theirs = (kind.make(llama(base), tmp_path, config()) for _ in range(2))
        assert_near(*(trained_values(each.model) for each in (ours, theirs)))
        report = pk.patch(ours.model)
    assert_same_training(ours, theirs, kind.rel, kind.keys)
    assert_fused(ours.model, report, blocks=2)
    if kind.has_head and not before("trl", "1.15"):
        assert report.losses[0].fused and not report.losses[0].fallbacks
    if kind.name in ("ORPO", "CPO"):
        assert "x by" not in str(report.losses[0]), report.losses[0]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_reward(base: str, tmp_path: Path) -> None:
    """A scalar head that trains with the adapters; quantize_model leaves it dense."""

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
        options = {"bf16": True, "learning_rate": 1e-3} if base == "nf4" else {}
        kind = Kind("Reward", PREFERENCES, SHORT | options)
        return kind.make(model, tmp_path, config(task_type="SEQ_CLS"))

    ours, theirs = trainer(), trainer()
    assert any("score" in name for name, p in ours.model.named_parameters() if p.requires_grad)
    report = pk.patch(ours.model)
    # The loss is of a difference of two rewards, each rounded to bf16. AdamW moves a parameter by the
    # learning rate even if its gradient is rounding.
    assert_same_training(ours, theirs, 5 * BF16 if base == "nf4" else CURVE)
    assert_fused(ours.model, report, blocks=2)
