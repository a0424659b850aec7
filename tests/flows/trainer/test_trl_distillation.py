"""The distillation trainers of integrations.trl against TRL's own."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flow_models import adapted, arguments, assert_same_logs, ids, in_fp32, llama, logged, tokenizer, words
from installed import before

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
if before("trl", "1.16"):
    pytest.skip("the distillation trainers of integrations.trl need TRL 1.16", allow_module_level=True)
import datasets
import trl

from peft_kernels.integrations import trl as ours
from peft_kernels.integrations.trl import distillation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 5
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def teacher() -> Any:
    """Of another width."""
    torch.manual_seed(7)
    config = llama().config.to_dict() | {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 3}
    config |= {"num_key_value_heads": 3, "head_dim": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def students() -> tuple[Any, Any]:
    model = adapted(llama("nf4"))
    model.config.use_cache = False
    return model, copy.deepcopy(model)


def trained(
    kind: Any, settings: Any, model: Any, folder: Path, data: Any, patches: bool, **options: Any
) -> Any:
    words_ = tokenizer()
    words_.chat_template = TEMPLATE
    made = kind(
        model=model,
        teacher_model=teacher(),
        args=arguments(settings, folder, STEPS, **options),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=words_,
    )
    in_fp32(made)
    if patches:
        pk.patch(made.model)
        pk.patch(made.teacher_model)
    torch.manual_seed(0)
    made.train()
    return made


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd(beta: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With models that are not patched TRL's loss runs, and a warning says so once."""
    theirs = pytest.importorskip("trl.experimental.gkd", reason="this TRL has no GKDTrainer")
    importlib.import_module("peft_kernels.integrations.trl.gkd").say_fallback.cache_clear()
    rows = [(words(row[:3]), words(row[3:])) for seed in range(3) for row in ids(seed)]
    turns = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in rows]
    data = [{"messages": list(pair)} for pair in turns]
    options: dict[str, Any] = {"beta": beta, "lmbda": 0.0, "max_length": 16, "gradient_accumulation_steps": 2}
    make = functools.partial(trained, settings=theirs.GKDConfig, folder=tmp_path, data=data, **options)
    model, stock = students()
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        got = make(ours.GKDTrainer, model=model, patches=True)
        assert not caplog.records
        plain = make(ours.GKDTrainer, model=copy.deepcopy(stock), patches=False)
    assert caplog.text.count("GKDTrainer computes all logits") == 1
    want = make(theirs.GKDTrainer, model=stock, patches=False)
    assert_same_logs(got, want)
    assert_same_logs(plain, want)
    assert (
        logged(got, "loss") == pytest.approx(logged(want, "loss"), rel=1e-5)
        and len(logged(got, "loss")) == STEPS
    )


@pytest.mark.parametrize("beta,temperature,patches", [(0.5, 0.9, False), (1.0, 1.0, True)])
def test_distillation(
    beta: float, temperature: float, patches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On-policy, with the student patched or not."""
    calls: list[Any] = []
    counted = lambda *args, **options: calls.append(args) or pk.linear_kl(*args, **options)  # noqa: E731
    monkeypatch.setattr(distillation, "linear_kl", counted)
    data = [{"prompt": words(row[:4])} for seed in range(3) for row in ids(seed)]
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "max_completion_length": 4}
    make = functools.partial(trained, settings=trl.DistillationConfig, folder=tmp_path, data=data, **options)
    model, stock = students()
    got = make(ours.DistillationTrainer, model=model, patches=patches)
    assert len(calls) == STEPS
    want = make(trl.DistillationTrainer, model=stock, patches=False)
    assert len(calls) == STEPS
    assert_same_logs(got, want)
    assert logged(got, "loss") == pytest.approx(logged(want, "loss"), rel=1e-5)
