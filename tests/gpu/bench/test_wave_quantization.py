"""How evenly GEMMs fill a card (`--only ^waves`), and how weights are divided into pieces."""

from __future__ import annotations

import itertools

import pytest

from bench.gpu import wave_quantization
from bench.gpu.roofline import BY_ARCHITECTURE, Gpu
from bench.gpu.wave_quantization import CARDS, GOAL, SHAPES, Case, Cell
from bench.lib import report
from peft_kernels.core.backends.cuda import CudaLibrary

WORST = {True: GOAL - 0.004, False: 0.37}
"""By whether a weight is large: 3072x3072 and 512x2048, both on RTX 5090."""
CUT = {"features": 16, "tokens": 8, "depth": 64, "workers": 8, "share": 1}


@pytest.fixture(scope="module")
def plans() -> CudaLibrary:
    found = wave_quantization.planner()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: gpu.name)
def test_kernels_keep_every_card_busy(plans: CudaLibrary, gpu: Gpu) -> None:
    cells = wave_quantization.cells(plans, gpu)
    for cell in cells:
        assert WORST[cell.is_large] <= cell.utilisation <= 1.0, f"{cell.name} by {cell.kernel}"
    good = sum(cell.utilisation >= GOAL for cell in cells)
    assert good >= 0.85 * len(cells), f"{good} of {len(cells)}"


def test_utilisation_counts_the_busiest_worker() -> None:
    def cell(is_dx: bool = False, m: int = 8, **cut: int) -> Cell:
        return Cell(BY_ARCHITECTURE[90], 4096, 2048, m, is_dx, "small8", CUT | cut)

    # 256 tiles of 32 groups over 132 x 8 warps: 7.76 each.
    assert cell(share=8).utilisation == pytest.approx(8192 / (1056 * 8))
    assert cell(share=16).utilisation == pytest.approx(8192 / (1056 * 16))
    # Partly filled tiles of tokens count by how full they are; a single one counts in full.
    assert cell(share=16, m=1).utilisation == cell(share=16, m=8).utilisation
    assert cell(share=16, m=12).utilisation == pytest.approx(1.5 * cell(share=16).utilisation)
    # The output features of dx are the weight's columns.
    assert cell(True, features=256, depth=128, workers=1, share=3).utilisation == pytest.approx(256 / 396)


def test_both_back_ends_cut_the_same_pieces(plans: CudaLibrary) -> None:
    linear_pieces = pytest.importorskip("peft_kernels.triton_kernels.linear.linear_pieces")
    lengths = {side for shape in SHAPES for side in shape} | {0, 1, 255, 257, 1027, 151936}
    for args in itertools.product(lengths, lengths, (2, 4)):
        assert plans.piece_of(*args) == linear_pieces.piece_size(*args), args


def test_a_weight_is_one_piece_up_to_128_mb(plans: CudaLibrary) -> None:
    for n, k in SHAPES:
        piece = min(plans.piece_of(n, k, 2), n)
        assert piece * k * 2 <= 2**27
        assert piece == n or n * k * 2 > 2**27
        assert -(-n // piece) == -(-n * k * 2 // 2**27) or n % 256 or 2**27 // (k * 2) % 256, (n, k)


def test_the_table_shows_the_worst_cells(plans: CudaLibrary) -> None:
    outcome = Case(BY_ARCHITECTURE[120]).run()
    text = report.render([outcome])
    assert "RTX 5090  9,437,184 or more  336" in text and "512x2048" in text and "small8" not in text
    assert len(outcome.data()["cells"]) == len(SHAPES) * 2 * len(wave_quantization.ROWS)


def test_without_a_library_the_reason_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wave_quantization, "planner", lambda: "not built")
    outcome = Case(CARDS[1]).run()
    assert "not built" in outcome.line() and "not built" in report.render([outcome])
