"""Up to how many rows of activations GEMMs are fused: the compiled library follows the table, both ways are
correct at any number of rows, and both are what is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from lora_cases import check_lora_linear, check_lora_linear_backward, check_nf4_linear, check_nf4_linear_dx
from skips import require
from stub_device import A100, H100, stub_device
from test_cuda_paths import CARDS, FEW, NEWER, sizes
from test_experts_cuda import layer

import ptx_backend as ptx
from bench.gpu.crossover_timing import MANY_ROWS, Target, time_cells
from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, RowRange, Rows, read

ESTIMATES = {
    crossovers._number(table.compute_capability): table.limits
    for table in read(crossovers.PACKAGED)
    if table.source == crossovers.ESTIMATED
}
ALL_CARDS = CARDS | NEWER | {"RTX-4090": (89, 128, 99 << 10)}


@pytest.fixture(autouse=True)
def _estimates() -> Iterator[None]:
    """Removes what a test sets."""
    yield
    if ptx.BACKEND.probe() is None:
        for capability in (*ESTIMATES, 103):
            for sms in (1, FEW, A100[1], H100[1]):
                ptx.BACKEND.extension.set_limits(capability, sms, [])


def limits(extension: ModuleType, card: Sequence[int], n: int, k: int) -> tuple[int, int]:
    """The most rows that are fused, by bisection, forward and backward."""
    found = []
    for direction in (0, 1):
        fused, pieces = 0, 1 << 20
        while pieces - fused > 1:
            m = (fused + pieces) // 2
            if extension.plan_for(m, n, k, 64, "bfloat16", *card)[direction] == "pieces":
                pieces = m
            else:
                fused = m
        found.append(fused)
    return found[0], found[1]


def set_rows(extension: ModuleType, card: Sequence[int], rows: int) -> None:
    extension.set_limits(card[0], card[1], [Rows(ANY, rows, rows)])


@pytest.mark.parametrize("name", ALL_CARDS)
def test_plans_follow_the_estimates(extension: ModuleType, name: str) -> None:
    card = ALL_CARDS[name]
    for n, k in ((1024, 4096), (2048, 4096), (2056, 4096), (4096, 8192), (4104, 8192), (28672, 8192)):
        row = next(row for row in ESTIMATES[card[0]].rows if n * k <= row.weights)
        assert limits(extension, card, n, k) == (row.forward, row.backward), (n, k)


def test_a_table_applies_to_cards_with_its_multiprocessors(extension: ModuleType) -> None:
    estimates = limits(extension, H100, 4096, 4096)
    extension.set_limits(90, 132, [Rows(1 << 20, 100, 70), Rows(ANY, 1000, 0)])
    assert limits(extension, H100, 1024, 1024) == (100, 70)
    assert limits(extension, H100, 1032, 1024) == (1000, 0)
    assert limits(extension, (90, 114, 227 << 10), 4096, 4096) == estimates
    assert limits(extension, (100, 132, 227 << 10), 4096, 4096) == (192, 192)
    extension.set_limits(90, 132, [])
    assert limits(extension, H100, 4096, 4096) == estimates


def test_wgmma_is_taken_where_the_table_says(extension: ModuleType) -> None:
    """It goes before the limit of the others, which apply where no kernel with wgmma fits."""
    small = Rows(1 << 20, 100, 70, RowRange(64, 99), RowRange(65, ANY))
    extension.set_limits(90, 132, [small, Rows(ANY, 256, 256)])

    def kinds(m: int, n: int, k: int, card: Sequence[int] = H100) -> list[str]:
        names = extension.plan_for(m, n, k, 64, "bfloat16", *card)
        return ["wgmma" if "wgmma" in name else "pieces" if name == "pieces" else "mma" for name in names]

    assert kinds(63, 1024, 1024) == ["mma", "mma"]
    assert kinds(64, 1024, 1024) == ["wgmma", "mma"]
    assert kinds(65, 1024, 1024) == kinds(99, 1024, 1024) == ["wgmma", "wgmma"]
    assert kinds(100, 1024, 1024) == ["mma", "wgmma"]
    assert kinds(101, 1024, 1024) == ["pieces", "wgmma"]
    assert kinds(100_000, 1024, 1024) == ["pieces", "wgmma"]
    assert kinds(128, 1024, 2048) == ["mma", "mma"]
    narrow = (90, 132, 99 << 10)
    assert kinds(99, 1024, 1024, narrow) == ["mma", "pieces"]


def test_an_unknown_card_is_as_the_one_before(extension: ModuleType) -> None:
    for unknown, known in ((87, 86), (103, 100), (110, 100), (121, 120)):
        shared = 227 << 10
        expected = limits(extension, (known, 100, shared), 4096, 4096)
        assert limits(extension, (unknown, 100, shared), 4096, 4096) == expected, unknown


def test_more_rows_than_indices_have_are_not_fused(extension: ModuleType) -> None:
    set_rows(extension, H100, ANY)
    for m, n, k, fused in (
        (1 << 20, 4096, 4096, True),
        (1 << 27, 4096, 4096, False),
        (1 << 31, 256, 64, False),
        (1 << 40, 256, 64, False),
    ):
        for kernels in ("by table", "mma.sync", "wgmma"):
            plans = extension.plan_for(m, n, k, 64, "bfloat16", *H100, kernels=kernels)
            assert [plan != "pieces" for plan in plans] == [fused, fused], (m, n, k)


def test_how_a_gemm_is_cut_does_not_depend_on_the_crossover(extension: ModuleType) -> None:
    problem = 128, 4096, 4096, 64, "bfloat16", *H100
    names, cuts = extension.plan_for(*problem), extension.cuts_for(*problem)
    assert "pieces" not in names and all(cuts)
    set_rows(extension, H100, 0)
    assert extension.plan_for(*problem) == ("pieces", "pieces")
    assert extension.plan_for(*problem, kernels="mma.sync") == names
    assert extension.cuts_for(*problem) == cuts


@pytest.mark.parametrize("name", ["A100", "RTX-3090", "H100"])
@pytest.mark.parametrize("m,rows", [(1, 0), (33, 0), (1091, ANY)], ids=["few", "more", "many"])
def test_both_ways_are_correct(extension: ModuleType, name: str, m: int, rows: int) -> None:
    """Few rows dequantised, and many more than any table fuses."""
    card = CARDS[name][0], FEW, CARDS[name][2]
    extension.set_card(*card)
    set_rows(extension, card, rows)
    case = sizes(m, 136, 192, torch.bfloat16, m) | {"bs": 64, "needs": "xab"}
    plans = extension.plan(m, 136, 192, 64, "bfloat16")
    assert (plans == ("pieces", "pieces")) == (rows == 0)
    for check in (check_nf4_linear, check_nf4_linear_dx, check_lora_linear, check_lora_linear_backward):
        check(case)


@pytest.mark.usefixtures("extension")
def test_experts_are_always_fused() -> None:
    with torch.no_grad():
        arguments = layer(64, 64, torch.bfloat16, [0, 3, 3, 90, 91])
    for rows in (ANY, 0):
        set_rows(ptx.BACKEND.extension, (80, FEW), rows)
        ptx.BACKEND.extension.reset_bank_counts()
        for op in ("experts_linear", "experts_linear_dx"):
            getattr(torch.ops.peft_kernels, op)(*arguments[op])
        sites = " ".join(ptx.BACKEND.extension.bank_counts())
        assert "linear_tiles.cuh" in sites and "linear_dx.cuh" in sites, rows


# What is timed.


def target(card: Card, cache_bytes: int, clock: Callable[[Callable[[], object]], float]) -> Target:
    ops = torch.ops.peft_kernels_ptx
    return Target(ptx.BACKEND.extension, ops, card, torch.device("cpu"), cache_bytes, clock)


def test_each_way_is_timed() -> None:
    """On a simulated card whose clock counts launches: GEMMs that are not fused launch to dequantise."""
    require("ptx")
    card = Card("a card", "9.0", H100[1])
    seen: list[set[str]] = []

    with stub_device(H100) as launches:

        def clock(run: Callable[[], object]) -> float:
            launches()
            run()
            done = launches()
            seen.append({launch.kernel for launch in done})
            return float(len(done))

        shapes, rows = ((64, 128), (128, 64)), (64, 1024)
        cells = time_cells(target(card, 3 * 64 * 64, clock), shapes, rows)
        assert limits(ptx.BACKEND.extension, H100, 4096, 4096)[0] == ESTIMATES[90].rows[-1].forward, (
            "left as it was set"
        )
    assert [cell[:4] for cell in cells] == [
        (*shape, m, way) for shape in shapes for m in (*rows, *MANY_ROWS) for way in (False, True)
    ]
    assert {time for cell in cells for time in (cell.fused, cell.dequantised, cell.wgmma)} == {1.0}
    for cell, fused, dequantised, wgmma in zip(cells, seen[::3], seen[1::3], seen[2::3], strict=True):
        (kernel,), (other,), (third,) = fused, dequantised, wgmma
        assert ("LinearDx" if cell.is_backward else "LinearTiles") in kernel, kernel
        assert "Dequantize" in other, other
        assert ("LinearWgmmaDx" if cell.is_backward else "LinearWgmma<") in third, third


@pytest.mark.parametrize("card,has_wgmma", [(A100, True), (H100, False)])
def test_wgmma_is_not_timed_where_it_is_not_used(card: tuple[int, int, int], has_wgmma: bool) -> None:
    require("ptx")
    with stub_device(card):
        on = target(Card("a card", f"{card[0] / 10}", card[1]), 0, lambda run: 1.0)
        cells = time_cells(on._replace(has_wgmma=has_wgmma), [(64, 128)], [64])
    assert [(cell.rows, cell.wgmma) for cell in cells] == [(64, None)] * 2


def test_a_table_of_python_is_a_table_of_the_library(extension: ModuleType) -> None:
    card = Card("NVIDIA H100 80GB HBM3", "9.0", H100[1])
    crossovers.set_limits(extension, card, Limits((Rows(1 << 20, 96, 64), Rows(ANY, 320, 128))))
    assert limits(extension, H100, 1024, 1024) == (96, 64)
    assert limits(extension, H100, 4096, 4096) == (320, 128)
