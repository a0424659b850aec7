"""Trainers that compute each prompt once, for policy and reference alike, against TRL's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from flow_checks import assert_near
from flow_families import tiny
from flow_models import adapted, arguments, config, ids, llama, tokenizer, words
from torch import Tensor, nn

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
import datasets
import trl
from trl.trainer.utils import add_fused_lm_head

from peft_kernels.integrations import scored_head, shared_prompts
from peft_kernels.integrations import trl as ours

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 3
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Tokens:
    """Counts the tokens that a model's layers compute."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
        layer.register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape[:2])))

    @property
    def total(self) -> int:
        return sum(rows * length for rows, length in self.shapes)


def preferences() -> Any:
    """Of several lengths."""
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


def trained(kind: Any, trl_config: Any, folder: Path, model: Any, base: str, **options: Any) -> Any:
    peft_config, extra = options.pop("peft_config", None), options.pop("extra", {})
    torch.manual_seed(3)
    made = kind(
        model=model,
        args=arguments(trl_config, folder, STEPS, gradient_checkpointing=False, **options),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **extra,
    )
    for p in made.model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    pk.patch(made.model)
    made.tokens = Tokens(made.model)
    torch.manual_seed(0)
    made.train()
    return made


def assert_same_logs(got: Any, want: Any) -> None:
    """Everything that was logged but times, and what the adapters have become."""
    for one, other in zip(got.state.log_history, want.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {k for k in one if "time" in k or "runtime" in k or "per_second" in k}:
            assert one[key] == pytest.approx(other[key], rel=2e-4, abs=2e-5), key
    adapters = [{n: p for n, p in each.model.named_parameters() if p.requires_grad} for each in (got, want)]
    assert_near(*adapters, bound=1e-3)


DPO_OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "several": {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.2], "ld_alpha": 0.5},
    "weighted": {"use_weighting": True, "eval_strategy": "steps", "eval_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 14},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", DPO_OPTIONS)
def test_dpo(name: str, tmp_path: Path) -> None:
    options = dict(DPO_OPTIONS[name])
    data = preferences()
    extra = {"train_dataset": data, "eval_dataset": data.select(range(3)) if "eval_steps" in options else None}

    def run(kind: Any) -> Any:
        # A model with an adapter gets a reference adapter besides; without one, the reference is the base.
        made = {"peft_config": config()} if name in ("several", "weighted") else {}
        model = llama("nf4") if made else adapted(llama("nf4"))
        return trained(kind, trl.DPOConfig, tmp_path, model, "nf4", extra=extra, beta=0.05, **made, **options)

    got, want = run(ours.DPOTrainer), run(trl.DPOTrainer)
    assert_same_logs(got, want)
    assert not got.log_probs.fallbacks
    assert got.tokens.total < 0.8 * want.tokens.total or got.tokens.shapes[0][0] == 2


def test_grpo(tmp_path: Path) -> None:
    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [sum(int(w[1:]) for w in text.split() if w.startswith("w")) / 100 for text in completions]

    data = datasets.Dataset.from_list(
        [{"prompt": words(row[: 9 + i % 3])} for i, row in enumerate(ids(0, rows=8, length=12))]
    )

    def run(kind: Any) -> Any:
        extra = {"train_dataset": data, "reward_funcs": rewards}
        options = {"num_generations": 4, "max_completion_length": 4, "beta": 0.04, "learning_rate": 1e-4}
        options |= {"per_device_train_batch_size": 4, "steps_per_generation": 2, "temperature": 0.9}
        return trained(
            kind, trl.GRPOConfig, tmp_path, adapted(llama("nf4")), "nf4", extra=extra, num_iterations=2, **options
        )

    got, want = run(ours.GRPOTrainer), run(trl.GRPOTrainer)
    assert_same_logs(got, want)
    assert not got.log_probs.fallbacks


# Log-probabilities and gradients by themselves.


def batch(left: bool = False) -> dict[str, Tensor]:
    """Sequences of two prompts, three of each, padded on one or on both sides; some tokens do not count."""
    tokens = ids(5, rows=6, length=20)
    seen, labels = torch.ones_like(tokens), tokens.clone()
    for i in range(6):
        tokens[i, :9] = tokens[i % 2, :9]
        start, end = (3 if left and i % 2 else 0), 17 + i % 4
        seen[i, :start], seen[i, end:] = 0, 0
        labels[i] = tokens[i]
        labels[i, : 9 if i != 4 else 11] = -100
    labels[seen == 0] = -100
    labels[3, 14] = -100
    return {"input_ids": tokens.where(seen > 0, 0), "attention_mask": seen, "labels": labels}


def install(model: Any, **options: Any) -> ours.LogProbs:
    """As a trainer does."""
    model.requires_grad_(False)
    add_fused_lm_head(model, temperature=options.get("temperature", 1.0), outputs=("log_probs", *OUTPUTS))
    return ours.LogProbs(
        model, **{"never": "", "temperature": 1.0, "outputs": OUTPUTS, "head": ""} | options
    )


def results(run: Any, model: Any, seed: int = 7) -> dict[str, Tensor]:
    """All outputs, and the gradient of the embeddings for a random sum of log-probabilities."""
    weight = model.get_input_embeddings().weight
    embedded = weight.detach().clone().requires_grad_()
    with torch.no_grad():
        mask = None
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, args, _: F.embedding(args[0], embedded)
    )
    try:
        out = run()
        noise = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad((out.log_probs * noise).sum(), embedded)
    finally:
        hook.remove()
    del mask
    return {name: value.detach().float() for name, value in out.items()} | {"gradient": gradient}


def both(model: Any, data: dict[str, Tensor], **options: Any) -> tuple[Any, Any, ours.LogProbs]:
    log_probs = install(model, **options)
    labels = data["labels"]
    inputs = {k: v for k, v in data.items() if k != "labels"}
    want = results(lambda: log_probs.theirs(**data, fused_lm_head=True), model)
    return results(lambda: log_probs(model, labels, inputs), model), want, log_probs


@pytest.mark.parametrize("head", ["", "TRL's"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_log_probs(left: bool, attention: str, head: str) -> None:
    model = llama(attn_implementation=attention)
    got, want, log_probs = both(model, batch(left), head=head, temperature=0.7)
    assert_near(got, want)
    assert not log_probs.fallbacks
