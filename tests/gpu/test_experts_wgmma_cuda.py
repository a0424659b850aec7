"""The grouped GEMMs for compute capability 9.0 (ExpertsWgmma), as PTX of sm_90a: results for any distribution
of rows, plans and planted faults."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from test_cuda_paths import FEW
from test_experts_cuda import HALVES, OPS, call, check, check_needs, check_order, layer
from test_experts_grouped import launched
from test_wgmma_cuda import FAULTS, H100, check_fault, faults_of
from torch import Tensor

from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import ALL_ROWS, ANY, NO_ROWS, Card, RowRange, Rows
from peft_kernels.core.backends.self_test import gemms
from peft_kernels.core.backends.self_test.gemms import WGMMA

ENDS = {
    "uneven": [0, 3, 3, 250, 330],
    "rest": [0, 0, 170, 170, 310],
    "one-row": [1, 2, 330, 331, 332],
    "none": [0, 0, 0, 0, 0],
    "last": [0, 0, 0, 0, 340],
    "edges": [64, 128, 129, 193, 340],
}
"""Ends of the rows of five experts, of 340 rows: 68 on average, for which a tile has 64."""
ROWS = 340
LARGE = {"uneven": [0, 1, 330], "rest": [0, 257, 300], "edges": [128, 256, 330]}
"""Of three experts, of 330 rows: 110 on average, for which a tile has 128."""


@pytest.fixture
def wgmma(extension: ModuleType) -> Iterator[ModuleType]:
    """The tables of all cards have ExpertsWgmma for any rows. On a small card."""
    extension.set_card(90, FEW, H100[2])
    with crossovers.forced(extension, Card("all", "9.0", 0), WGMMA):
        yield extension
    crossovers.set_estimates(extension)


def case(
    n: int, k: int, ends: list[int], dtype: torch.dtype = torch.bfloat16, rows: int = ROWS, **options: Any
) -> dict[str, tuple[Any, ...]]:
    return layer(n, k, dtype, ends, rows=rows, **options)


@pytest.mark.parametrize("op", OPS)
def test_where_plans_take_it(wgmma: ModuleType, op: str) -> None:
    def kernels(**options: Any) -> list[str]:
        return [name for name in launched(op, case(200, 192, **options)[op]) if "Wgmma" in name]

    is_dx = "dx" in op or "backward" in op
    name = "ExpertsWgmmaDx" if is_dx else "ExpertsWgmma"
    few = [0, 1, 2, 3, 4]
    assert kernels(ends=few) == [name]
    wgmma.set_card(80, FEW, H100[2])
    assert not kernels(ends=few)
    wgmma.set_card(90, FEW, H100[2])
    own = RowRange(64, 68)
    ranges = (NO_ROWS, own) if is_dx else (own, NO_ROWS)
    wgmma.set_limits(90, 0, [], [Rows(ANY, ANY, ANY, *ranges)])
    for rows, taken in ((315, []), (316, [name]), (340, [name]), (341, [])):  # by the mean, rounded up
        assert kernels(ends=few, rows=rows) == taken
    wgmma.set_limits(90, 0, [], [Rows(ANY, 0, 0, ALL_ROWS, ALL_ROWS)])
    assert kernels(ends=few) == [name], "goes before the other limits"


def test_nothing_takes_it_before_it_is_checked(extension: ModuleType) -> None:
    extension.set_card(90, FEW, H100[2])
    assert not any("Wgmma" in name for name in launched(OPS[0], case(64, 64, ENDS["uneven"])[OPS[0]]))


@HALVES
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows(wgmma: ModuleType, op: str, ends: str, dtype: torch.dtype) -> None:
    check(op, case(200, 192, ENDS[ends], dtype)[op])


@HALVES
@pytest.mark.parametrize("ends", LARGE)
@pytest.mark.parametrize("op", OPS)
def test_large_tiles(wgmma: ModuleType, op: str, ends: str, dtype: torch.dtype) -> None:
    check(op, case(136, 320, LARGE[ends], dtype, rows=330)[op])


@HALVES
@pytest.mark.parametrize("n", [64, 75, 264])
def test_tails_of_features(wgmma: ModuleType, n: int, dtype: torch.dtype) -> None:
    """Odd numbers of features, too, which only the forward takes."""
    arguments = case(n, 64, ENDS["uneven"], dtype)
    for op in OPS:
        check(op, arguments[op])


@HALVES
@pytest.mark.parametrize("adapter", ["fp32", "same"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("r", [4, 16, 70])
@pytest.mark.parametrize("op", OPS[2:])
def test_adapters(wgmma: ModuleType, op: str, r: int, nested: bool, adapter: str, dtype: torch.dtype) -> None:
    of_adapter = torch.float32 if adapter == "fp32" else dtype
    check(op, case(48, 128, ENDS["uneven"], dtype, r=r, nested=nested, adapter=of_adapter)[op])


@HALVES
@pytest.mark.parametrize("sms,ends", [(3, [100]), (2, [40, 128]), (3, [65, 66, 322])], ids=str)
def test_tiles_that_blocks_share(wgmma: ModuleType, sms: int, ends: list[int], dtype: torch.dtype) -> None:
    """Long sums; the delta is added by one of the blocks."""
    wgmma.set_card(90, sms, H100[2])
    tile = 64 if ends[-1] <= 104 * len(ends) else 128
    tiles, stages = sum(-(-(b - a) // tile) for a, b in pairwise([0, *ends])), 3648 // 64
    assert -(-tiles * stages // sms) + 16 < -(-tiles // sms) * stages, "whole tiles take as long"
    forward, backward = (case(n, k, ends, dtype, rows=ends[-1], r=3) for n, k in ((72, 3648), (3648, 64)))
    for op in OPS:
        check(op, (backward if "dx" in op or "backward" in op else forward)[op])


def test_more_experts_than_a_warp_has_lanes(wgmma: ModuleType) -> None:
    ends = [2400 * i * i // 36**2 for i in range(1, 37)]
    for op, arguments in case(16, 64, ends, rows=2400).items():
        check(op, arguments)


@pytest.mark.parametrize("op", OPS)
def test_experts_without_rows_are_not_read(wgmma: ModuleType, op: str) -> None:
    """Their NaN scales and NaN adapters do not reach the results, and nor do NaN rows of no expert."""
    arguments = case(48, 128, ENDS["rest"], nested=False)[op]
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.shape[0] == 5 and argument.is_floating_point():
            argument[0], argument[1], argument[3] = torch.nan, torch.nan, torch.nan
        if isinstance(argument, Tensor) and argument.shape[0] == ROWS:
            argument[310:] = torch.nan
    for result in call(op, arguments):
        assert result.isfinite().all()


@pytest.mark.parametrize("ends", [[-5, 400, 3, 7, 90], [90, 60, 30, 20, 10], [-1] * 5, [2**31 - 1] * 5])
@pytest.mark.parametrize("op", OPS)
def test_invalid_ends_stay_in_bounds(wgmma: ModuleType, op: str, ends: list[int]) -> None:
    """Memory is guarded: an access past the end of a tensor is a fault."""
    call(op, case(48, 128, ends)[op])


def test_gradients_do_not_depend_on_which_are_needed(wgmma: ModuleType) -> None:
    check_needs(case(72, 192, ENDS["uneven"]))


@pytest.mark.parametrize("seed", range(3))
def test_order_of_threads_changes_no_bit(wgmma: ModuleType, seed: int) -> None:
    """Nor does uninitialised memory: counters are zero again after every call."""
    wgmma.set_card(90, 3, H100[2])
    check_order(seed, case(72, 3648, [65, 66, 322], rows=322, r=3))


def three_products() -> list[Tensor]:
    """Of tiles of 64 rows, of some that blocks share, and of dx with 128 rows a tile."""
    forward, shared = case(136, 192, ENDS["uneven"]), case(72, 3648, [100], rows=100)
    backward = case(136, 192, LARGE["uneven"], rows=330)
    return [
        *call("experts_linear", forward["experts_linear"]),
        *call("experts_linear", shared["experts_linear"]),
        *call("experts_linear_dx", backward["experts_linear_dx"]),
    ]


@pytest.mark.parametrize("start", [0, 8192])
def test_where_shared_memory_starts(wgmma: ModuleType, start: int) -> None:
    want = three_products()
    wgmma.set_shared_start(start)
    for got, expected in zip(three_products(), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(wgmma: ModuleType, fault: str) -> None:
    check_fault(wgmma, fault, three_products)


# ---- The self-test of a card ----------------------------------------------------------------------------


def test_every_kernel_is_tested(wgmma: ModuleType) -> None:
    tiles = set()
    for problem in gemms.EXPERTS_PROBLEMS:
        for n, k in ((problem.features, problem.terms), (problem.terms, problem.features)):
            plan = problem.rows, len(problem.ends), n, k, 64, "float16", *H100
            assert wgmma.experts_plan_for(*plan) == ("wgmma", "wgmma")
        tiles.add(64 if problem.rows <= 104 * len(problem.ends) else 128)
    assert tiles == {64, 128}


# One run need not show a race between blocks.
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"parts-not-awaited", "no-barrier-of-warpgroups"}))
def test_the_self_test_finds_planted_faults(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(gemms, "problems", lambda card: [])
    extension.set_edit(lambda text: FAULTS[fault](text) if "wgmma" in text else text)
    try:
        found = faults_of(extension, sms=2)
    finally:
        extension.set_edit(None)
    assert found and all("wgmma" in name for name in found), found
