"""Mixture of experts: the fp64 truth, and bytes of the whole model."""

from __future__ import annotations

import pytest
import torch
from bench_checks import line_of

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from bench.lib import report
from bench.models import moe

TINY = moe.Sizes(hidden=64, inner=32, experts=6, top_k=2)


def test_the_truth_is_that_of_peft_in_fp64() -> None:
    mixtures = moe.Mixtures(TINY, torch.float64)
    mixtures.__dict__["packed"] = moe.Mixtures(TINY, torch.float32).packed
    got = mixtures.training_call(mixtures.adapted("eager", patch=False).double(), 24)()
    truth = mixtures.in_peft_layout(mixtures.truth(24, training=True))
    assert got.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(got[name], tensor)


def test_bytes() -> None:
    outcome = moe.Footprint().run()
    (goal,) = outcome.goals()
    assert goal[1] and 61e9 < outcome.dense < 61.2e9, "it has 30.5 billion weights"
    assert "27." in report.render([outcome]) and line_of(outcome)["ratio"] == outcome.ratio
