"""Mixture of experts: all contenders compute the same, and a wrong one is not timed."""

from __future__ import annotations

import importlib

import pytest
import torch
from bench_checks import line_of

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from bench.lib import report
from bench.lib.report import ONCE, OURS
from bench.models import moe

TINY = moe.Sizes(hidden=64, inner=32, experts=6, top_k=2)


@pytest.mark.parametrize("tokens", [1, 24])
def test_forward(tokens: int) -> None:
    result = moe.forward(tokens, "bf16", TINY).run(ONCE)
    assert not result.wrong and not result.absent, (result.wrong, result.absent)
    assert set(result.seconds) == {OURS, moe.GROUPED, moe.EAGER, moe.DEQUANTISE}


@pytest.mark.parametrize("tokens", [1, 24])
def test_training(tokens: int) -> None:
    result = moe.training(tokens, "bf16", TINY).run(ONCE)
    assert not result.wrong and not result.absent, (result.wrong, result.absent)
    assert set(result.seconds) == {OURS, moe.PEFT_GROUPED, moe.PEFT_EAGER, moe.PEFT_NF4}


def test_the_truth_is_that_of_peft_in_fp64() -> None:
    mixtures = moe.Mixtures(TINY, torch.float64)
    mixtures.__dict__["packed"] = moe.Mixtures(TINY, torch.float32).packed
    got = mixtures.training_call(mixtures.adapted("eager", patch=False).double(), 24)()
    truth = mixtures.in_peft_layout(mixtures.truth(24, training=True))
    assert got.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(got[name], tensor)


def test_ours_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("peft_kernels.patch.experts.forward")
    right = module.summed

    def wrong(*args: object) -> object:
        a, b, scaling = right(*args)
        return a, b, 1.1 * scaling

    monkeypatch.setattr(module, "summed", wrong)
    result = moe.training(24, "bf16", TINY).run(ONCE)
    assert OURS in result.wrong and not result.seconds


def test_bytes() -> None:
    outcome = moe.Footprint().run()
    (goal,) = outcome.goals()
    assert goal[1] and 61e9 < outcome.dense < 61.2e9, "it has 30.5 billion weights"
    assert "27." in report.render([outcome]) and line_of(outcome)["ratio"] == outcome.ratio


def test_names() -> None:
    names = [case.name for case in moe.standard("bf16")]
    assert names[0] == "moe-bytes" and "moe-lora-2048x768-m1024-bf16" in names and len(names) == 9
