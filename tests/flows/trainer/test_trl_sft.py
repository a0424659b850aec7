"""The SFTTrainer that computes no logits, against TRL's own."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_checks import Calls, assert_near
from flow_models import adapted, arguments, assert_same_logs, ids, in_fp32, llama, logged, tokenizer, words
from installed import before
from rounding import ONE_STEP

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
if before("trl", "1.15"):
    pytest.skip("the trainers of integrations.trl need TRL 1.15", allow_module_level=True)
import datasets
import trl

from peft_kernels.integrations.trl import SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 3


def completions() -> Any:
    """Completion-only examples of several lengths."""
    rows = [row for seed in range(2) for row in ids(seed, vocabulary=100)]
    parts = ((words(row[:3]), words(row[3 : 6 + i % 4])) for i, row in enumerate(rows))
    return datasets.Dataset.from_list(
        [{"prompt": prompt, "completion": " " + completion} for prompt, completion in parts]
    )


def trained(kind: Any, model: Any, folder: Path, **options: Any) -> Any:
    made = kind(
        model=model,
        args=arguments(trl.SFTConfig, folder, STEPS, max_length=16, optim="adamw_torch", **options),
        train_dataset=completions(),
        eval_dataset=completions().select(range(3)),
        processing_class=tokenizer(),
    )
    pk.patch(in_fp32(made).model)
    torch.manual_seed(0)
    made.train()
    return made


def packed_head(model: Any) -> Any:
    model.lm_head.weight.requires_grad_(False)
    return pk.quantize_model(model, skip=())


MODELS: dict[str, Any] = {
    "nf4": lambda: adapted(llama("nf4", vocab_size=100)),
    "trained-head": lambda: adapted(llama(vocab_size=100), modules_to_save=["lm_head"]),
    "whole": lambda: llama(vocab_size=100, tie_word_embeddings=True).train(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    "trained-head": {"completion_only_loss": False},
    "whole": {"loss_type": "dft"},
}


@pytest.mark.parametrize("name", MODELS)
def test_same_logs(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.config.use_cache = False
    with Calls() as calls:
        got = trained(SFTTrainer, copy.deepcopy(model), tmp_path, **OPTIONS[name])
    assert not got.log_probs.heads and "by pk.token_log_probs" in str(got.log_probs)
    op = "linear_cross_entropy" if name == "nf4" else "linear_cross_entropy_trained"
    assert calls.counts[op] >= STEPS
    want = trained(trl.SFTTrainer, model, tmp_path, **OPTIONS[name])
    assert_same_logs(got, want)


def test_a_head_in_nf4(tmp_path: Path) -> None:
    """TRL does not support it; compared with a dense head of the same values."""
    model = adapted(packed_head(llama(vocab_size=100)), target_modules=["q_proj", "v_proj"])
    dense = copy.deepcopy(model)
    head = dense.get_output_embeddings()
    plain = torch.nn.Linear(64, 100, bias=False).requires_grad_(False)
    plain.weight.data = head.weight.dequantize(torch.float32)
    dense.base_model.model.lm_head = plain
    losses = []
    for each in (model, dense):
        made = trained(SFTTrainer, each, tmp_path)
        assert not made.log_probs.heads
        losses.append(logged(made))
    assert losses[0] == pytest.approx(losses[1], rel=ONE_STEP)


def test_unknown_head_falls_back_to_trl(tmp_path: Path) -> None:

    class Head(torch.nn.Linear):
        pass

    model = adapted(llama(vocab_size=100))
    model.get_output_embeddings().__class__ = Head
    made = trained(SFTTrainer, model, tmp_path)
    assert "by TRL's head" in str(made.log_probs) and "the head is a Head" in str(made.log_probs)


@pytest.mark.parametrize("first", ["patch", "trainer"])
@pytest.mark.parametrize("name", MODELS)
def test_trls_own_trainer_on_a_patched_model(name: str, first: str, tmp_path: Path) -> None:
    """An unchanged script: TRL adds its head before or after the patch, and unpatch gives it back."""
    made = []
    for patched in (True, False):
        model = MODELS[name]()
        model.config.use_cache = False
        report = pk.patch(model) if patched and first == "patch" else None
        options = OPTIONS[name] | {"max_length": 16, "optim": "adamw_torch"}
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments(trl.SFTConfig, tmp_path, STEPS, **options),
            train_dataset=completions(),
            eval_dataset=completions().select(range(3)),
            processing_class=tokenizer(),
        )
        if patched:
            report = report or pk.patch(trainer.model)
        in_fp32(trainer)
        torch.manual_seed(0)
        with Calls() as calls:
            trainer.train()
        if patched:
            op = "linear_cross_entropy" if name == "nf4" else "linear_cross_entropy_trained"
            assert calls.counts[op] >= STEPS and report.losses[0].fused, report
            assert not report.losses[0].fallbacks
            inner = report.losses[0]._module()
            pk.unpatch(model)
            assert inner.forward.__func__.__code__.co_name == "_fused_forward"
        made.append(trainer)
    assert_same_logs(*made)


@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trained"])
def test_a_gradient_of_the_entropy(trains_head: bool) -> None:
    """As in GRPO with an entropy bonus, against TRL's head; and the model's own loss beside it."""
    from trl.trainer.utils import add_fused_lm_head

    batch, found = ids(0, vocabulary=100), []
    for patched in (True, False):
        model = adapted(llama(vocab_size=100), modules_to_save=["lm_head"] if trains_head else None).train()
        report = pk.patch(model) if patched else None
        inner = model.get_base_model()
        add_fused_lm_head(inner, temperature=0.8, outputs=("log_probs", "entropy"))
        with Calls() as calls:
            out = model(input_ids=batch, labels=batch, fused_lm_head=True)
            (out.loss - 0.5 * (out.entropy * (out.entropy > 2)).mean()).backward()
            assert torch.isfinite(inner(input_ids=batch, labels=batch).loss)
        if report is not None:
            forward = "linear_cross_entropy_trained" if trains_head else "linear_cross_entropy"
            assert calls.counts[forward] == 2 and calls.counts["linear_cross_entropy_backward"] == 1
            assert report.losses[0].fused and not report.losses[0].fallbacks
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_near(*found, ONE_STEP)
