"""Bottleneck adapters: all contenders run, and a wrong result is not timed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.lib.report import ONCE, OURS
from bench.ops import bottlenecks
from bench.ops.bottlenecks import Kind
from peft_kernels.adapters.adapter import BottleneckAdapter

KINDS = [
    Kind(train=False),
    Kind(train=False, parallel=True, mixed=True, activation="silu"),
    Kind(train=True, parallel=True, activation="gelu"),
    Kind(train=True, mixed=True),
    Kind(train=True, autocast=True),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.group)
@pytest.mark.parametrize("m,dtype", [(1, "bf16"), (70, "bf16"), (5, "fp32")])
def test_all_contenders_run(kind: Kind, m: int, dtype: str) -> None:
    if kind.autocast and dtype == "fp32":
        pytest.skip("there is no autocast to fp32 on a CPU")
    result = bottlenecks.bottleneck(kind, m, dtype, 64, 12, compiles=False).run(ONCE)
    assert not result.wrong and not result.absent
    assert set(result.seconds) == {OURS, bottlenecks.MODULES}


@pytest.mark.parametrize("kind", KINDS[1:3], ids=lambda kind: kind.group)
def test_a_wrong_adapter_is_not_timed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Any = BottleneckAdapter.forward
    monkeypatch.setattr(BottleneckAdapter, "forward", lambda *args: forward(*args) * 1.1)
    result = bottlenecks.bottleneck(kind, 9, "bf16", 64, 12, compiles=False).run(ONCE)
    assert OURS in result.wrong and OURS not in result.seconds


def test_the_standard_cases() -> None:
    names = [case.name for case in bottlenecks.standard()]
    assert len(set(names)) == len(names)
    for name in ("bottleneck-train-768x768-m2048-bf16", "bottleneck-parallel-mixed-forward-768x768-m1-bf16"):
        assert name in names
