"""A step of the optimizer on cards that are not here, as `make bench ARGS='--only ^waves-adamw'` tells it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from bench.gpu import optimizer_waves
from bench.gpu import wave_quantization as waves
from bench.gpu.optimizer_waves import LIMITS, SIZES, Kind, Step
from bench.lib import report

H100, B200 = waves.CARDS[1], waves.CARDS[2]
FP32, BF16 = Kind(False, "fp32", 8), Kind(False, "bf16", 8)


def test_bytes_of_an_element() -> None:
    assert FP32.bytes == 3 * 4 + 2 * 2 + 4 * 4 / 256 and Kind(True, "bf16", 32).bytes == 3 * 2 + 2 * 4


def test_time_is_that_of_the_scarcest_resource() -> None:
    step = Step(H100, FP32, "100M in one tensor")
    cycles = 132 * 1.83e9
    assert step.parts["m"] == pytest.approx(1e8 * FP32.bytes / 3.35e12)
    assert step.parts["i"] == pytest.approx(1e8 * LIMITS[FP32][0] / (128 * cycles))
    assert step.parts["u"] == pytest.approx(1e8 * 2 / 16 / cycles)
    each = sum(optimizer_waves.wavefronts().values())
    assert step.parts["s"] == pytest.approx(1e8 * 2 * each / 32 / cycles)
    assert step.bound == "m" and step.seconds == pytest.approx(step.parts["m"] / step.utilisation)
    assert Step(B200, BF16, "100M in one tensor").bound == "i"


def test_busiest_warps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # 264 blocks of threads of ten warps. 2640 blocks of moments: one each; one more takes a second round.
    monkeypatch.setitem(SIZES, "a", (2640 * 256,))
    monkeypatch.setitem(SIZES, "b", (2640 * 256 + 1,))
    # A run of 10 that is parts of two tensors takes two rounds.
    monkeypatch.setitem(SIZES, "c", (4 * 256, 2636 * 256))
    found = [Step(H100, FP32, size).utilisation for size in "abc"]
    assert found == pytest.approx([1, 2641 / 5280, 1 / 2])


def test_lookups_in_the_same_word_are_one() -> None:
    """Four rows of lanes, as one holds every fourth element of 128."""
    same, apart = torch.zeros(256, dtype=torch.int64), torch.arange(256)
    assert optimizer_waves._repeats(same) == 1
    assert optimizer_waves._repeats(apart) == 4  # 0, 4, 8, ...: eight banks for 32 lanes
    assert all(2 < found < 5 for found in optimizer_waves.wavefronts().values())


def test_its_table() -> None:
    outcome = optimizer_waves.Case(B200).run()
    text = report.render([outcome])
    assert "a step of the optimizer on B200" in text and "of the bandwidth, by arithmetic" in text
    assert "5M in 448 tensors" in text and len(outcome.data()["steps"]) == len(outcome.steps)
