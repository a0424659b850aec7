"""From the times of GEMMs to a table of crossovers, with a simulated clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.gpu import crossover_timing
from bench.gpu.crossover_timing import (
    BLOCKSIZE,
    Cell,
    Target,
    crossover,
    device_clock,
    time_cells,
    wgmma_rows,
)
from peft_kernels.core.backends.crossovers import ANY, NO_ROWS, Card, RowRange, Rows


def cells(*times: tuple[int, float, float], shape: tuple[int, int] = (64, 64)) -> list[Cell]:
    return [Cell(*shape, rows, False, fused, dequantised) for rows, fused, dequantised in times]


@pytest.mark.parametrize(
    "times,limit",
    [
        ([(64, 1.0, 2.0), (128, 2.0, 2.1), (256, 4.0, 3.0), (512, 8.0, 5.0)], 160),  # 181 is halfway
        ([(64, 3.0, 2.0), (128, 4.0, 2.1)], 32),  # never fused: but where reading takes the time
        ([(64, 1.0, 2.0), (128, 1.5, 2.1)], 128),  # never dequantised, as far as it was timed
        ([(96, 1.0, 2.0), (128, 3.0, 2.0)], 96),
        # A cell that noise turned round does not decide.
        ([(64, 1.0, 2.0), (128, 2.1, 2.0), (256, 2.0, 3.0), (512, 8.0, 5.0)], 352),
        ([(64, 1.0, 2.0), (128, 2.9, 2.0), (256, 2.9, 3.0), (512, 8.0, 5.0)], 64),
    ],
)
def test_crossover_takes_the_least_time(times: list[tuple[int, float, float]], limit: int) -> None:
    assert crossover(cells(*times)) == crossover(cells(*reversed(times))) == limit


def test_weights_of_one_size_are_taken_together() -> None:
    """One of them by more than the other."""
    wide = cells((64, 1.0, 2.0), (128, 1.0, 2.0), shape=(128, 64))
    tall = cells((64, 1.0, 2.0), (128, 1.0, 1.5), shape=(64, 128))
    both = [cell._replace(is_backward=way) for cell in (*wide, *tall) for way in (False, True)]
    small = [cell._replace(fused=9.0) for cell in cells((64, 1.0, 2.0), (128, 1.0, 2.0), shape=(32, 64))]
    small += [cell._replace(is_backward=True, fused=1.0) for cell in small]
    assert crossover_timing.crossovers([*both, *small]) == (Rows(4096, 32, 128), Rows(ANY, 128, 128))


@pytest.mark.parametrize(
    "times,rows",
    [
        # Rows, with the others, with wgmma: better in the middle, everywhere, nowhere.
        ([(64, 1.0, 1.1), (128, 2.0, 1.5), (256, 3.0, 2.0), (512, 4.0, 5.0)], RowRange(65, 352)),
        ([(64, 1.0, 0.9), (128, 2.0, 1.5), (256, 3.0, 2.0), (512, 4.0, 3.9)], RowRange(64, 512)),
        ([(64, 1.0, 1.1), (128, 2.0, 2.1)], NO_ROWS),
        ([(64, 1.0, 1.0), (128, 2.0, 2.0)], NO_ROWS),
        # A cell that noise turned round does not decide; one that is alone does not either.
        ([(64, 1.0, 0.5), (128, 2.0, 2.1), (256, 3.0, 2.0), (512, 4.0, 5.0)], RowRange(64, 352)),
        ([(64, 1.0, 0.9), (128, 1.0, 1.9), (256, 3.0, 1.0), (512, 4.0, 5.0)], RowRange(161, 352)),
    ],
)
def test_wgmma_is_used_where_that_takes_the_least_time(
    times: list[tuple[int, float, float]], rows: RowRange
) -> None:
    found = [Cell(64, 64, m, False, other, 99.0, wgmma) for m, other, wgmma in times]
    assert wgmma_rows(found, 512) == wgmma_rows(found[::-1], 512) == rows
    # Beyond the rows that are fused otherwise, dequantising is what it is compared with.
    found = [cell._replace(fused=0.01, dequantised=cell.fused) for cell in found]
    assert wgmma_rows(found, 32) == rows
    assert wgmma_rows([cell._replace(wgmma=None) for cell in found], 32) == NO_ROWS
    assert wgmma_rows([], 32) == NO_ROWS


def test_the_clock_leaves_out_the_first_call_and_what_python_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose work starts when it is queued, and after all that was queued before."""
    python = card = 0.0
    takes = iter([0.9, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])

    def queue(seconds: float) -> None:
        nonlocal card
        card = max(card, python) + seconds

    def run() -> None:
        nonlocal python
        python += 1e-3  # less than the card sleeps
        queue(next(takes))

    class Event:
        at = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(card, python)

        def synchronize(self) -> None:
            nonlocal python
            python = max(python, self.at)

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue(cycles / 2e9))
    assert device_clock(run) == pytest.approx(3e-3)


def target(library: Any, ops: Any, clock: Callable[..., float], cache_bytes: int = 0) -> Target:
    return Target(library, ops, Card("", "9.0", 1), torch.device("cpu"), cache_bytes, clock)


def test_copies_of_a_weight_take_turns(request: pytest.FixtureRequest) -> None:
    """As many as twice the cache holds, two at least; every call has its own codes."""

    class Library:
        def set_limits(self, *args: object) -> None:
            pass

        def plan(self, *args: object) -> tuple[str, str]:
            return "tiles256", "dx64"

    class Ops:
        def __init__(self) -> None:
            self.codes: list[int] = []

        def nf4_linear(
            self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *rest: object
        ) -> None:
            assert codes.shape == (64 * 128 // 2,) and scales.shape == (64 * 128 // BLOCKSIZE,)
            assert scales.dtype == torch.float32
            assert codes.unique().numel() > 200, "constants take less power"
            self.codes.append(codes.data_ptr())

        def nf4_linear_dx(self, x: torch.Tensor, *rest: object) -> None:
            assert x.shape == (96, 64) and rest[-1] == 128

    def clock(run: Callable[[], object]) -> float:
        run()
        return 6.0

    before = torch.get_default_dtype()
    request.addfinalizer(lambda: torch.set_default_dtype(before))
    torch.set_default_dtype(torch.bfloat16)
    for cache, copies in ((0, 2), (5 * 4096, 10), (1 << 30, 32)):
        ops = Ops()
        cells = time_cells(target(Library(), ops, clock, cache), [(64, 128)], [96])
        assert len(set(ops.codes)) == copies and len(ops.codes) == 2 * copies
        assert cells[0].fused == 6.0 / copies


def test_random_numbers_of_the_user_stay_as_they_are() -> None:
    class Nothing:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: ("tiles256", "dx64")

    before = torch.get_rng_state()
    time_cells(target(Nothing(), Nothing(), lambda run: 1.0), [(64, 64)], [64])
    assert torch.equal(torch.get_rng_state(), before)
