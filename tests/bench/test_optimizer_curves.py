"""Loss curves by optimizer, on a tiny model; the real one takes most of an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
from rounding import CURVE
from test_example_finetune import tiny  # noqa: F401

from bench.lib import report
from bench.lib.report import OURS
from bench.models import optimizer_curves
from bench.models.optimizer_curves import ALL_8BIT, BNB_8BIT, TORCH, Case, Curves, Training

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def case(tiny: Path, clip: float = 0.0) -> Case:  # noqa: F811
    return Case(clip, steps=6, every=4, model=tiny / "model", data=tiny / "pairs.jsonl")


def test_all_train_alike(tiny: Path) -> None:  # noqa: F811
    said: list[str] = []
    curves = case(tiny).run(progress=said.append)
    assert [*curves.losses, *curves.absent] == [TORCH, OURS, BNB_8BIT, ALL_8BIT]
    for found in curves.losses.values():
        assert list(found) == [0, 4, 6]
        assert found[0] == curves.losses[TORCH][0] and found[6] < found[0]
        assert found[6] == pytest.approx(curves.losses[TORCH][6], rel=CURVE)
    # LoRA's tensors have 1024 elements and fewer there.
    assert (curves.shares[TORCH], curves.shares[OURS], curves.shares[ALL_8BIT]) == (0, 0, 1)
    assert not curves.wrong and all(met for _, met in curves.goals())
    text = report.render([curves])
    assert "held-out loss" in text and f"{OURS} by {TORCH}: within 1%" in text
    assert any("step 6 of 6" in line for line in said)


def test_gradients_are_clipped_for_both(tiny: Path) -> None:  # noqa: F811
    curves = case(tiny, clip=1e-12).run()
    assert list(curves.losses) == [TORCH, OURS]
    for found in curves.losses.values():
        # Gradients are as small as eps: parameters hardly change.
        assert found[6] == pytest.approx(found[0], rel=1e-4)


def test_every_run_starts_from_the_same_adapter(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    training = Training(case(tiny), tmp_path)
    optimizer = case(tiny).contenders()[OURS][1](training.restart())
    last = dict(training.losses(optimizer, 0.0, lambda text: None))
    assert training.held_out_loss() == last[6] < training.before
    training.restart()
    assert training.held_out_loss() == training.before


def test_a_curve_that_leaves_the_others_misses_the_goal() -> None:
    def curves(ours: float) -> Curves:
        last = {TORCH: 3.0, BNB_8BIT: 3.0, OURS: ours}
        return Curves(Case(), losses={name: {0: 4.0, 300: loss} for name, loss in last.items()})

    assert [met for _, met in curves(3.02).goals()] == [True, True]
    assert [met for _, met in curves(3.04).goals()] == [False, False]
    assert next(iter(curves(2.96).goals())) == (
        f"held-out loss, {OURS} by {TORCH}: within 1%, measured 1.33%", False
    )  # fmt: skip


def test_the_rate_goes_up_and_down() -> None:
    rates = [optimizer_curves.rate(step, 300) for step in range(300)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and 0 < rates[-1] < 1e-3
