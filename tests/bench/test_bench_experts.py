"""Experts: all contenders run, and a wrong result is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peft_kernels as pk
from bench.lib.report import ONCE, OURS
from bench.ops import experts

TINY = experts.Shape(4, 2, 64, 128)


@pytest.mark.parametrize("group", experts.TITLES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_all_contenders_run(group: str, tokens: int) -> None:
    result = experts.experts(group, TINY, tokens, "bf16").run(ONCE)
    assert not result.wrong and not result.absent
    assert set(result.seconds) == {OURS, experts.DENSE, experts.DEQUANTISED}


@pytest.mark.parametrize("group", [experts.FORWARD, experts.TRAIN])
def test_a_wrong_result_is_not_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = pk.experts_linear
    monkeypatch.setattr(pk, "experts_linear", lambda *args: original(*args) * 1.1)
    result = experts.experts(group, TINY, 9, "bf16").run(ONCE)
    assert OURS in result.wrong and OURS not in result.seconds


def test_every_token_has_its_experts() -> None:
    ends = experts.Experts(experts.GATE_UP, torch.bfloat16).ends(16)
    assert ends.shape == (128,) and ends.dtype == torch.int32 and ends[-1] == 16 * 8
    counts = ends.diff(prepend=ends.new_zeros(1))
    assert counts.min() >= 0 and counts.max() <= 16
