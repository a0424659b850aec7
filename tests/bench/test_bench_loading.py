"""Loading: measured values, and that loading the whole model first would be detected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers_models  # noqa: F401  (skips where transformers is missing)

from bench.lib import report
from bench.lib.report import OURS
from bench.models import loading
from bench.models.loading import IN_MEMORY, MAPPED, Load, Loaded

MB = 10**6


def a_load(seconds: float = 1.0, resident: int = 60 * MB, mapped: int = 0) -> Load:
    return Load(seconds, 30 * MB, 20 * MB, mapped, 55 * MB, resident, 900 * MB)


def outcome(stored: str = "bf16", **loads: list[Load]) -> Loaded:
    names = {"ours": OURS, "memory": IN_MEMORY, "mapped": MAPPED}
    found = {names[key]: value for key, value in loads.items()}
    return Loaded(loading.Case("small", stored), loads=found, largest=10 * MB)


@pytest.mark.parametrize(
    ("ours", "met"),
    [
        pytest.param([a_load()], [True, True], id="both"),
        pytest.param([a_load(resident=66 * MB)], [False, True], id="memory"),
        pytest.param([a_load(), a_load(resident=66 * MB)], [False, True], id="memory-once"),
        pytest.param([a_load(resident=50 * MB, mapped=16 * MB)], [False, True], id="mapped"),
        pytest.param([a_load(seconds=1.4)], [True, False], id="time"),
        pytest.param(
            [a_load(seconds=1.2), a_load(seconds=1.2), a_load(seconds=9)], [True, True], id="median"
        ),
    ],
)
def test_goals(ours: list[Load], met: list[bool]) -> None:
    found = list(outcome(ours=ours, memory=[a_load()], mapped=[a_load(0.1)]).goals())
    assert [is_met for _, is_met in found] == met, found


def test_from_fp32_pages_of_the_file_do_not_count() -> None:
    assert [met for _, met in outcome("fp32", ours=[a_load(resident=99 * MB)]).goals()] == [True]


def test_what_is_missing_has_no_goal() -> None:
    assert list(outcome(memory=[a_load()]).goals()) == []
    assert len(list(outcome(ours=[a_load()]).goals())) == 1


def test_its_table() -> None:
    text = report.render([outcome(ours=[a_load(2.0)], memory=[a_load(1.0)])])
    assert "small-bf16" in text and "2.00" in text and "at most 65 MB, measured 60 MB: met" in text
    assert "at most 1.3 times bf16, in memory, measured 2.00: MISSED" in text


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
    ours, whole = (loading.load(how, tmp_path) for how in ("ours", "whole"))
    assert (ours.nf4, ours.dense) == (whole.nf4, whole.dense)
    assert ours.nf4 + ours.dense < ours.peak(stored) <= ours.limit(largest), ours
    assert whole.peak(stored) > whole.limit(largest), whole


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="tiny"):
        loading.load("ours", tmp_path)
