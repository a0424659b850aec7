"""Loss curves by optimizer, on a tiny model; the real one takes most of an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
from rounding import CURVE
from test_example_finetune import tiny  # noqa: F401

from bench.lib.report import OURS
from bench.models import optimizer_curves
from bench.models.optimizer_curves import ALL_8BIT, BNB_8BIT, TORCH, Case

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def case(tiny: Path) -> Case:  # noqa: F811
    return Case(steps=6, every=4, model=tiny / "model", data=tiny / "pairs.jsonl")


def test_all_train_alike(tiny: Path) -> None:  # noqa: F811
    curves = case(tiny).run()
    assert [*curves.values, *curves.absent] == [TORCH, OURS, BNB_8BIT, ALL_8BIT]
    stock = curves.values[TORCH]
    for found in curves.values.values():
        assert list(found) == ["0 steps", "4 steps", "6 steps", optimizer_curves.IN_8BIT]
        assert found["0 steps"] == stock["0 steps"] > found["6 steps"]
        assert found["6 steps"] == pytest.approx(stock["6 steps"], rel=CURVE)
    # LoRA's tensors have 1024 elements and fewer there.
    shares = [curves.value(name, optimizer_curves.IN_8BIT) for name in (TORCH, OURS, ALL_8BIT)]
    assert shares == [0, 0, 1]
    assert not curves.wrong


def test_the_rate_goes_up_and_down() -> None:
    rates = [optimizer_curves.rate(step, 300) for step in range(300)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and 0 < rates[-1] < 1e-3
