"""The comparison of several processes with one, on a tiny model."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_example_finetune import tiny  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from bench.models import distributed
from bench.models.distributed import Result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
]


@pytest.fixture
def options(tiny: Path) -> object:  # noqa: F811
    return Namespace(steps=4, model=tiny / "model", data=tiny / "pairs.jsonl")


def test_killed_and_gone_on_with_in_another_number(options: object, tmp_path: Path) -> None:
    one = distributed.run(options, "one", 1, tmp_path / "one")
    assert one is not None and sorted(one.losses) == [0, 1, 2, 3] and one.share == 1.0
    assert distributed.run(options, "fsdp2", 2, tmp_path / "killed", killed="1") is None
    again = distributed.run(
        options, "fsdp2", 3, tmp_path / "again", resume=tmp_path / "killed" / "checkpoint"
    )
    assert again is not None and sorted(again.losses) == [2, 3] and again.share < 0.52
    for step, loss in again.losses.items():
        assert loss == pytest.approx(one.losses[step], rel=1e-5)


def test_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    one = Result({0: 2.0, 1: 1.0}, {"a": torch.tensor([3.0, 4.0])}, 1.0)
    other = Result({1: 1.01}, {"a": torch.tensor([3.0, 4.5])}, 0.5)
    distributed.compare_with("x", other, one)
    text = capsys.readouterr().out
    assert text == (
        "x: 1 steps, losses within 1.0e-02, adapters within 1.0e-01 of their change, base in a process at "
        "most 50.0%\n"
    )
    with pytest.raises(RuntimeError, match="x: did not finish"):
        distributed.compare_with("x", None, one)
    with pytest.raises(SystemExit):
        distributed.main(["--steps", "3"])
    assert "--steps: expected at least 4, got 3" in capsys.readouterr().err
