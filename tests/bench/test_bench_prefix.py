"""Prefix tuning: all contenders run, and a wrong result is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_checks import TINY_BLOCK

from bench.lib.report import ONCE, OURS
from bench.models import prefix
from bench.models.model import ModelSizes


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_all_attend_alike(dtype: str) -> None:
    result = prefix.attention(5, 3, 7, dtype).run(ONCE)
    assert not result.wrong and not result.absent, result
    assert set(result.seconds) == {OURS, prefix.PEFT, prefix.MERGED}


def test_all_join_alike() -> None:
    result = prefix.join(5, 3, 7, "bf16").run(ONCE)
    assert not result.wrong and not result.absent, result
    assert set(result.seconds) == {OURS, prefix.PEFT}


def test_a_wrong_attention_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = prefix.shared
    monkeypatch.setattr(prefix, "shared", lambda *tensors: right(*tensors) * 1.1)
    result = prefix.attention(5, 3, 7, "bf16").run(ONCE)
    assert OURS in result.wrong and OURS not in result.seconds


@pytest.mark.parametrize("projection", [False, True])
def test_steps_are_taken(projection: bool) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    sizes = ModelSizes(TINY_BLOCK, layers=2, vocabulary=64)
    result = prefix.step(3, projection, 2, 5, "fp32", sizes).run(ONCE)
    assert not result.wrong and not result.absent, result
    assert set(result.seconds) == {OURS, prefix.PEFT}
    assert torch.is_grad_enabled()
