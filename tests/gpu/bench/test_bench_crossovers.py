"""bench/gpu/crossovers.py without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from skips import require

from bench.gpu import crossovers as script
from bench.gpu.crossover_timing import Cell, Shape, Target, time_cells
from bench.gpu.device_cases import SHAPES
from peft_kernels.core.backends import crossovers, cuda
from peft_kernels.core.backends.crossovers import ANY, NO_ROWS, Card

CARD = Card("NVIDIA H100 80GB HBM3", "9.0", 132)


def test_a_rehearsal_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("ptx")
    assert script.main(["--rehearse", str(tmp_path / "crossovers.json")]) == 0
    (table,) = crossovers.read(tmp_path / "crossovers.json")
    assert (table.card, table.source) == ("stub device", "measured")
    assert [[row.weights for row in rows] for rows in table.limits] == [[14188, ANY]] * 2
    said = capsys.readouterr().out
    assert "stub device: us fused / by wgmma / by dequantise + cuBLAS" in said and said.count("128x192") == 4
    assert "stub device, rows and weights of an expert: us fused" in said


def test_a_card_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On all projections and rows; the file can be pinned."""
    asked = []

    def timed(on: Target, shapes: list[Shape], rows: list[int], experts: int = 0) -> list[Cell]:
        asked.append((on.card, on.cache_bytes, shapes, rows, experts))
        return [
            Cell(*shape, m, way, m * 1e-7 * (1 + way), 2.5e-5, None if experts else 2.2e-5)
            for shape in shapes for m in rows for way in (False, True)
        ]  # fmt: skip

    monkeypatch.setattr(cuda.BACKEND, "probe", lambda: None)
    monkeypatch.setattr(cuda.BACKEND, "_extension", object())
    monkeypatch.setattr(cuda.BACKEND, "card", lambda index: CARD)
    monkeypatch.setattr(cuda.BACKEND, "has_wgmma", lambda index: True)
    cache = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cache)
    monkeypatch.setattr(script, "time_cells", timed)
    path = tmp_path / "crossovers.json"
    assert script.main([str(path)]) == 0
    assert asked == [
        (CARD, 50 << 20, SHAPES, (64, 96, 128, 192, 256, 384, 512, 768, 1024), 0),
        (CARD, 50 << 20, ((1536, 2048), (2048, 768)), (64, 128, 192, 256, 384, 512, 768, 1024, 2048), 32),
    ]
    monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, str(path))
    table = crossovers.choose(CARD)
    assert '"torch": "' in path.read_text()
    assert [len(rows) for rows in table.limits] == [3, 2]
    # 22 us where the others take 10 to 19, and 25 with more rows.
    assert {row[1:] for row in table.limits.rows} == {(192, 96, (193, 1024), (97, 1024))}
    assert {row[1:] for row in table.limits.experts} == {(192, 64, NO_ROWS, NO_ROWS)}
    said = capsys.readouterr().out
    assert all(words in said for words in ("1024x4096", "M=1024", " 6 / 22 / 25 ", "31,387,297"))


def test_the_card_here_can_be_timed() -> None:
    require("cuda")
    cells = time_cells(script.card_here(), [(256, 128)], [64, 128])
    assert all(0 < seconds < 1 for cell in cells for seconds in (cell.fused, cell.dequantised))


def test_without_a_card_the_script_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if cuda.BACKEND.probe() is None:
        pytest.skip("there is a GPU")
    assert script.main([str(tmp_path / "crossovers.json")]) == 2
    assert "back end cuda cannot be used here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
