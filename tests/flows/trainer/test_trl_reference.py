"""Trainers that compute each prompt once for policy and reference, against TRL's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import (
    Tokens,
    adapted,
    arguments,
    assert_same_logs,
    config,
    ids,
    in_fp32,
    llama,
    tokenizer,
    words,
)
from installed import before

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
if before("trl", "1.15"):
    pytest.skip("the trainers of integrations.trl need TRL 1.15", allow_module_level=True)
import datasets
import trl

from peft_kernels.integrations import trl as ours

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 2
PLAIN = {"gradient_checkpointing": False, "optim": "adamw_torch"}


class Untried(dict[ours.Kind, str]):
    """Skips the trial of shared prompts."""

    def __contains__(self, kind: object) -> bool:
        return True

    def __missing__(self, kind: ours.Kind) -> str:
        return ""


def preferences() -> Any:
    """Prompts and completions of several lengths."""
    rows = [row for seed in range(3) for row in ids(seed, rows=4, length=24)]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": words(row[: 10 + i % 3]),
                "chosen": " " + words(row[13 : 16 + i % 4]),
                "rejected": " " + words(row[19 : 21 + i % 3]),
            }
            for i, row in enumerate(rows)
        ]
    )


def trained(
    kind: Any, trl_config: Any, folder: Path, model: Any, given: dict[str, Any], **options: Any
) -> Any:
    torch.manual_seed(3)
    made = kind(
        model=model,
        args=arguments(trl_config, folder, STEPS, **PLAIN | options),
        processing_class=tokenizer(),
        **given,
    )
    pk.patch(in_fp32(made).model)
    for log_probs in (getattr(made, "log_probs", None), getattr(made, "ref_log_probs", None)):
        if log_probs is not None:  # the trial is not part of a step
            log_probs.misfits = Untried()
    models = {"policy": made.model, "reference": made.ref_model}
    made.tokens = {n: Tokens(each) for n, each in models.items() if each is not None}
    torch.manual_seed(0)
    made.train()
    return made


def assert_less_is_computed(got: Any, want: Any) -> None:
    for log_probs in (got.log_probs, got.ref_log_probs):
        assert log_probs is None or not log_probs.fallbacks
    assert got.tokens and got.tokens.keys() == want.tokens.keys()
    for name, tokens in got.tokens.items():
        assert tokens.total < 0.85 * want.tokens[name].total, name


DPO_OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointed": {"gradient_checkpointing": True, "loss_type": ["sigmoid", "sft"]},
    "precomputed": {"precompute_ref_log_probs": True, "max_length": 14, "ld_alpha": 0.5},
    "weighted": {
        "use_weighting": True, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5,
        "eval_strategy": "steps", "eval_steps": 2,
    },
    "own reference": {},
    "trained head": {},
}  # fmt: skip


@pytest.mark.parametrize("name", DPO_OPTIONS)
def test_dpo(name: str, tmp_path: Path) -> None:
    options, data = DPO_OPTIONS[name], preferences()
    given = {"train_dataset": data, "eval_dataset": data.select(range(3))}

    def run(kind: Any) -> Any:
        # With an adapter in the model, its reference is a copy of that adapter; else the base.
        if name == "weighted":
            model, more = llama("nf4"), {"peft_config": config()}
        elif name == "own reference":
            model, more = llama(), {"ref_model": llama(initializer_range=0.1)}
        else:
            heads = {"modules_to_save": ["lm_head"]} if name == "trained head" else {}
            model, more = adapted(llama("nf4"), **heads), {}
        return trained(kind, trl.DPOConfig, tmp_path, model, given | more, beta=0.05, **options)

    got, want = run(ours.DPOTrainer), run(trl.DPOTrainer)
    assert_same_logs(got, want)
    assert_less_is_computed(got, want)
    assert not got.log_probs.heads


def test_grpo(tmp_path: Path) -> None:
    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [sum(int(w[1:]) for w in text.split() if w.startswith("w")) / 100 for text in completions]

    data = datasets.Dataset.from_list(
        [{"prompt": words(row[: 9 + i % 3])} for i, row in enumerate(ids(0, rows=8, length=12))]
    )

    def run(kind: Any) -> Any:
        given = {"train_dataset": data, "reward_funcs": rewards}
        options = {"num_generations": 4, "max_completion_length": 4, "beta": 0.04, "learning_rate": 1e-4}
        # Steps not aligned with generation also compute the old policy's log-probabilities.
        options |= {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2}
        model = adapted(llama("nf4"))
        return trained(kind, trl.GRPOConfig, tmp_path, model, given, temperature=0.9, **options)

    got, want = run(ours.GRPOTrainer), run(trl.GRPOTrainer)
    assert_same_logs(got, want)
    assert_less_is_computed(got, want)
