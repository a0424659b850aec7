"""Peak memory of a training step: measured in its own process, and only if its gradients are correct."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bench_checks import TINY_BLOCK, skip_without

from bench.lib.cases import PEFT_ON_BNB
from bench.lib.report import OURS
from bench.models import model, peak
from bench.models.peak import Peak

TINY = peak.Case(model.STEP, 2, 16, "bf16", model.ModelSizes(TINY_BLOCK, layers=1, vocabulary=500))


def test_one_step_of_each_in_a_process_of_its_own() -> None:
    skip_without("peft", "transformers", "bitsandbytes")
    found = peak.Case(model.TEXTBOOK, TINY.batch, TINY.tokens, TINY.dtype, TINY.sizes).run()
    assert not found.wrong and found.values.keys() == {OURS, PEFT_ON_BNB}
    assert all(0 < one["before, MB"] <= one["MB"] for one in found.values.values())


@pytest.mark.parametrize("in_step", [True, False])
def test_memory_held_in_the_step_counts(in_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB in the step raise the peak, though freed before its end; before the step they do not."""
    skip_without("peft", "transformers")
    Path("/proc/self/clear_refs").write_text("5")  # resets an earlier peak
    before = peak.step_alone(TINY, OURS)
    step = model.Models.step

    def holding(models: model.Models, of: object, ids: torch.Tensor) -> object:
        call = step(models, of, ids)  # type: ignore[arg-type]

        def held() -> object:
            if (len(ids) > 1) is in_step:
                torch.ones(256 << 20, dtype=torch.uint8)
            return call()

        return held

    monkeypatch.setattr(model.Models, "step", holding)
    after = peak.step_alone(TINY, OURS)
    assert after.norm == before.norm
    more = (after.resident - after.floor) - (before.resident - before.floor)
    assert more > 200 << 20 if in_step else more < 50 << 20


@pytest.mark.parametrize("norm", [1.1, float("nan")])
def test_wrong_gradients_are_not_reported(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "missing", lambda needs: "")
    monkeypatch.setattr(peak, "ProcessPoolExecutor", lambda *args, **options: ThreadPoolExecutor(1))
    norms = {OURS: norm, PEFT_ON_BNB: 1.0}
    monkeypatch.setattr(peak, "step_alone", lambda case, name: Peak(100, 50, norms[name]))
    found = TINY.run()
    assert set(found.wrong) == {OURS} and set(found.values) == {PEFT_ON_BNB}
