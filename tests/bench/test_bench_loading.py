"""Loading: measured values, and that loading the whole model first would be detected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers_models  # noqa: F401  (skips where transformers is missing)

from bench.lib import report
from bench.lib.report import OURS
from bench.models import loading
from bench.models.loading import Load

MB = 10**6


def a_load(seconds: float = 1.0, resident: int = 60 * MB, mapped: int = 0) -> Load:
    return Load(seconds, 30 * MB, 20 * MB, mapped, 55 * MB, resident, 900 * MB)


@pytest.mark.parametrize(
    ("stored", "loads", "peak"),
    [
        ("bf16", [a_load()], 60),
        ("bf16", [a_load(), a_load(resident=66 * MB)], 66),
        ("bf16", [a_load(resident=50 * MB, mapped=16 * MB)], 66),
        ("fp32", [a_load(resident=99 * MB)], 55),  # pages of the file do not count
    ],
)
def test_the_worst_peak_counts(stored: str, loads: list[Load], peak: int) -> None:
    found = report.Figures(loading.Case("small", stored), forms=loading.FORMS)
    loading.compare(stored, {OURS: loads}, found)
    assert found.value(OURS, "peak") == peak and found.value(OURS, "model") == 50


def test_the_median_time_counts() -> None:
    found = report.Figures(loading.Case("small", "bf16"), forms=loading.FORMS)
    loading.compare("bf16", {OURS: [a_load(1.2), a_load(1.3), a_load(9)]}, found)
    assert found.value(OURS, "s") == 1.3


def test_a_checkpoint_of_two_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    largest = loading.write(tmp_path / "model", loading.TINY, torch.bfloat16)
    assert largest == 2 * 128 * 64
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 2
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values()), found
    assert model.dtype == torch.bfloat16 and 0.015 < float(model.lm_head.weight.float().std()) < 0.025


@pytest.mark.slow
@pytest.mark.parametrize("stored", loading.DTYPES)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
def test_loading_the_whole_model_first_exceeds_the_limit(stored: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    largest = loading.write(tmp_path / "model", loading.SIZES["small"], loading.DTYPES[stored])
    loading.write(tmp_path / "tiny", loading.TINY, loading.DTYPES[stored])
    ours, whole = (loading.load(how, tmp_path) for how in (OURS, loading.WHOLE))
    assert (ours.nf4, ours.dense) == (whole.nf4, whole.dense)
    most = ours.nf4 + ours.dense + 1.5 * largest
    assert ours.nf4 + ours.dense < ours.peak(stored) <= most, ours
    assert whole.peak(stored) > most, whole


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="tiny"):
        loading.load(OURS, tmp_path)
