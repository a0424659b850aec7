"""The bench of serving: every contender computes the same, and a wrong one is not timed."""

from __future__ import annotations

import pytest
from bench_checks import TINY_BLOCK

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from bench.lib.report import ONCE, OURS
from bench.models import serving
from bench.models.model import ModelSizes
from peft_kernels.serving import layers

TINY = ModelSizes(TINY_BLOCK, layers=2, vocabulary=128)
CASES = {
    serving.WHOLE: lambda: serving.whole(4, 3, "bf16", TINY),
    serving.DECODE: lambda: serving.decode(serving.DECODE, 5, "bf16", TINY),
    serving.DECODE_16: lambda: serving.decode(serving.DECODE_16, 5, "bf16", TINY),
    serving.BOTTLENECK: lambda: serving.decode(serving.BOTTLENECK, 5, "bf16", TINY),
}


@pytest.mark.parametrize("group", CASES)
def test_contenders(group: str) -> None:
    result = CASES[group]().run(ONCE)
    assert not result.wrong and not result.absent, (result.wrong, result.absent)
    assert set(result.seconds) == {OURS, serving.PASSES if group == serving.WHOLE else serving.ONE}


@pytest.mark.parametrize("group", [serving.WHOLE, serving.DECODE])
def test_ours_that_gives_rows_another_adapter_is_not_timed(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layers._mixed
    monkeypatch.setattr(layers, "_mixed", lambda base, all, groups, x: right(base, all, groups[::-1], x))
    result = CASES[group]().run(ONCE)
    assert OURS in result.wrong and not result.seconds


def test_names() -> None:
    names = [case.name for case in serving.standard("bf16")]
    assert names[1] == "serving-decode-1536x576-8x1-bf16" and len(names) == 4
