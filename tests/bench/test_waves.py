"""How products fill a card, as `make bench ARGS='--only ^waves'` tells, and the rule that cuts pieces."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from bench.gpu import wave_quantization as waves
from bench.gpu.wave_quantization import CARDS, GOAL, PIECES, Card, Cell
from bench.lib import report


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    found = waves.planner()
    if isinstance(found, str):
        pytest.skip(found)
    return found


LARGE = 9 * 2**20
"""Weights: smaller ones have too few units of work to deal out, and launches take longer than they."""
WORST = {True: GOAL - 0.004, False: 0.37}
"""By whether a weight is large: 3072x3072 and 512x2048, both on RTX 5090."""


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_kernels_keep_every_card_busy(plans: ModuleType, card: Card) -> None:
    cells = waves.cells(plans, card, [m for m in waves.ROWS if m <= 512])
    for cell in cells:
        assert cell.way != PIECES
        worst = WORST[cell.n * cell.k >= LARGE]
        assert worst <= cell.utilisation <= 1.0, f"{cell.name} by {cell.way}: {cell.utilisation:.1%}"
    fine = sum(cell.utilisation >= GOAL for cell in cells)
    assert fine >= 0.85 * len(cells), f"{fine} of {len(cells)}"


# The model against cuts that can be counted by hand.

H100 = CARDS[1]


def cell_of(is_dx: bool = False, m: int = 8, **cut: int) -> Cell:
    unit = {
        "features": 16,
        "tokens": 8,
        "depth": 64,
        "workers": 8,
        "share": 1,
        "blocks": 1,
        "tiles": 1,
        "splits": 1,
    }
    return Cell(H100, 4096, 2048, m, is_dx, "small8", unit | {"workspace_bytes": 0} | cut)


def test_utilisation_counts_the_busiest_worker() -> None:
    # 256 tiles of 32 groups for 132 x 8 warps: 7.76 for each.
    assert cell_of(share=8).utilisation == pytest.approx(8192 / (1056 * 8))
    assert cell_of(share=16).utilisation == pytest.approx(8192 / (1056 * 16))
    # Of tokens, tiles that are not full count as far as they are; one that is alone counts whole.
    assert cell_of(share=16, m=1).utilisation == cell_of(share=16, m=8).utilisation
    assert cell_of(share=16, m=12).utilisation == pytest.approx(1.5 * cell_of(share=16).utilisation)
    # Of dx, the result's features are the weight's columns.
    assert cell_of(True, features=256, depth=128, workers=1, share=3).utilisation == pytest.approx(256 / 396)


def test_time_is_that_of_the_scarcest_resource() -> None:
    cell = cell_of(share=8)
    weights = 4096 * 2048
    assert cell.parts["m"] == pytest.approx((weights * waves.NF4_BYTES + 2 * 8 * 6144) / H100.gpu.bandwidth)
    assert cell.parts["i"] == pytest.approx(1.8 * weights / (132 * 128 * 1.83e9))
    assert cell.parts["c"] == pytest.approx(2 * 8 * weights / (800e12 * 0.63))
    assert cell.bound == "m" and cell.seconds == pytest.approx(cell.parts["m"] / cell.utilisation)
    assert cell.seconds > cell.floor


def test_pieces_are_waves_of_torch_s_tiles() -> None:
    # 2048 rows are 8 tiles: with 512 of 4096 columns 32 tiles on 132 multiprocessors, eight times.
    eight = dataclasses.replace(cell_of(m=2048), way=PIECES, cut={"piece": 512})
    assert eight.utilisation == pytest.approx(8 * 32 / (8 * 132))
    whole = dataclasses.replace(eight, cut={"piece": 4096})
    assert whole.utilisation == pytest.approx(256 / 264)


# Pieces.


def test_both_back_ends_cut_the_same_pieces(plans: ModuleType) -> None:
    linear_pieces = pytest.importorskip("peft_kernels.triton_kernels.linear.linear_pieces")
    lengths = {side for shape in waves.shapes() for side in shape} | {0, 1, 255, 257, 1027, 151936}
    for args in itertools.product(lengths, lengths, (2, 4)):
        assert plans.piece_of(*args) == linear_pieces.piece_size(*args), args


def test_a_weight_is_one_piece_up_to_128_mb(plans: ModuleType) -> None:
    for n, k in waves.shapes():
        piece = min(plans.piece_of(n, k, 2), n)
        assert piece * k * 2 <= 2**27
        assert piece == n or n * k * 2 > 2**27
        assert -(-n // piece) == -(-n * k * 2 // 2**27) or n % 256 or 2**27 // (k * 2) % 256, (n, k)


# What is printed.


def test_the_table_shows_the_worst_cells(plans: ModuleType) -> None:
    outcome = waves.Case(H100).run()
    text = report.render([outcome])
    assert "waves: how kernels fill H100 SXM" in text and "all cells" not in text and "small8" in text
    assert len(outcome.data()["cells"]) == len(waves.shapes()) * 2 * len(waves.ROWS)
    every = report.render([waves.Case(H100, True).run()])
    assert "all cells" in every and every.count("14336x4096 dx M=512") >= 1


def test_without_a_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "planner", lambda: "not built")
    outcome = waves.Case(H100).run()
    assert "not built" in outcome.line() and "not built" in report.render([outcome])
