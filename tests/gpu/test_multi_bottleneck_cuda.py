"""Bottleneck adapters for groups of rows on CUDA: the kernels as PTX, and that the host never waits."""

from __future__ import annotations

from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from multi_bottleneck_cases import arguments, case_of, judge, row_group
from numbers_policy import at_odd_address, case_id, short
from skips import require
from stub_device import A100, H100, stub_device, torch_ops
from test_bottleneck_cuda import names_of
from test_cuda_graphs import ALLOWED_INSIDE
from torch import Tensor

import ptx_backend as ptx
import testing

HALVES = (torch.bfloat16, torch.float16)
OPS = ("multi_bottleneck", "multi_bottleneck_backward")
LISTED = ["SortRows", "ListExpertRows"]
FORWARD = [*LISTED, "BottleneckGroups"]
ZEROED = {"aten::zeros", "aten::zero_", "aten::fill_"}
"""The bottleneck, whose columns an adapter may lack."""
BACKWARD = [*FORWARD, *["LoraOverRows"] * 2, *["SumGroups"] * 2]


def call(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """All results."""
    found: list[Tensor] = []
    for one in getattr(torch.ops.peft_kernels, name)(*args):
        found += one if isinstance(one, list) else [one]
    return found


def changed(args: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*args[:at], value, *args[at + 1 :])


def some_cases() -> list[dict[str, Any]]:
    """Every dtype, rows with and without vector loads, and ranks that all warps or some of them share."""
    ranks = ((5, 12, 70, 136), (256, 4, 8), (33,), (64, 20, 128, 16, 1))
    return [
        case_of(
            dtype=dtype, k=k, ranks=mixed, m=(150, 201)[i % 2], beside=i % 3 == 1, biases=i % 5 != 2,
            parameters=("fp32", "same")[(i + i // 4) % 2], groups=("mixed", "texts")[i // 4 % 2],
        )
        for i, (dtype, k, mixed) in enumerate(product(HALVES, (104, 45), ranks))
    ]  # fmt: skip


@pytest.mark.parametrize("case", some_cases(), ids=case_id)
def test_the_kernels_are_correct(extension: ModuleType, case: dict[str, Any]) -> None:
    judge(case)


@pytest.mark.parametrize("groups", ["mixed", "texts"])
@pytest.mark.parametrize("adapters", [31, 32, 70])
def test_more_adapters_than_a_launch_takes(extension: ModuleType, adapters: int, groups: str) -> None:
    """And than rows, of which some adapters have none."""
    judge(case_of(ranks=(4, 8, 3) * 23 + (8,) * (adapters - 69) if adapters > 69 else (4,) * adapters,
                  groups=groups, m=69, k=24), by_value=True)  # fmt: skip


def test_more_rows_than_are_sorted_at_a_time(extension: ModuleType) -> None:
    judge(case_of(m=2 * 2048 + 77, k=8, ranks=(3, 4)))


@pytest.mark.parametrize("m", [9, 150])
def test_a_gradient_does_not_depend_on_which_others_are_needed(extension: ModuleType, m: int) -> None:
    """Nor on which adapters are trained."""
    args = arguments(case_of(m=m, dtype=torch.float16))["multi_bottleneck_backward"]
    everything = torch.ops.peft_kernels.multi_bottleneck_backward(*args)
    at = [0, 3, 4, 5, 6]
    places = [len(args) - 6, *range(len(args) - 4, len(args))]
    for place, result in zip(places, at, strict=True):
        for trained in ([True] * 3, [False, True, False]):
            given: list[Any] = list(args)
            for other in places:
                given[other] = False if other == places[0] else [False] * 3
            given[place] = True if place == places[0] else trained
            found = torch.ops.peft_kernels.multi_bottleneck_backward(*given)
            for i, (one, whole) in enumerate(zip(found, everything, strict=True)):
                if i != result:
                    assert not any(t.numel() for t in (one if isinstance(one, list) else [one]))
                elif isinstance(one, list):
                    for j, needed in enumerate(trained):
                        assert torch.equal(one[j], whole[j]) if needed else not one[j].numel()
                else:
                    assert torch.equal(one, whole)


def test_any_address_and_any_order_of_threads(extension: ModuleType) -> None:
    """The same bits: vector loads and loads of single elements give the same results."""
    case = case_of(k=48, ranks=(20, 4, 8), beside=True, parameters="same", m=70)
    for name, args in arguments(case).items():
        want = call(name, args)
        ptx.BACKEND.check_order(7, partial(call, name, args))
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                odd: Any = at_odd_address(value)
            elif isinstance(value, list) and value and isinstance(value[1], Tensor):
                odd = [value[0], at_odd_address(value[1]), *value[2:]]
            else:
                continue
            for got, expected in zip(call(name, (*args[:i], odd, *args[i + 1 :])), want, strict=True):
                assert torch.equal(got, expected), (name, i)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=short)
def test_groups_of_either_width_stay_in_bounds(extension: ModuleType, dtype: torch.dtype) -> None:
    """Memory is guarded: an access past the end of a tensor is a fault."""
    for name, args in arguments(case_of(m=45)).items():
        at = 2 if name == "multi_bottleneck" else 3
        wild = torch.tensor([-(2**31), 2**31 - 1, 2, 3, -1] * 9, dtype=dtype)
        tame = torch.tensor([-1, -1, 2, -1, -1] * 9)
        with ptx.BACKEND.guarding():
            got = call(name, (*args[:at], wild, *args[at + 1 :]))
        for one, expected in zip(got, call(name, (*args[:at], tame, *args[at + 1 :])), strict=True):
            assert torch.equal(one.nan_to_num(), expected.nan_to_num())


COMPOSED: dict[str, dict[str, Any]] = {"fp32": {"dtype": torch.float32}, "ranks": {"ranks": (4, 257)}}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_the_kernels_do_not_take_is_composed(extension: ModuleType, name: str) -> None:
    judge(case_of(m=45, k=24, **COMPOSED[name]))


@pytest.mark.parametrize("name", [*COMPOSED, "norm"])
def test_launches_of_what_is_composed(name: str) -> None:
    require("ptx")
    for op, args in arguments(case_of(m=45, k=24, **COMPOSED.get(name, {}))).items():
        norm_weight = 3 if op == "multi_bottleneck" else 4
        given = changed(args, norm_weight, [None, torch.ones(24), None]) if name == "norm" else args
        with stub_device(H100) as launches:
            call(op, given)
            assert not {"SortRows", "BottleneckGroups"} & {*names_of(launches())}


@pytest.mark.parametrize("card", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("m", [0, 8, 4500])
def test_nothing_synchronises(m: int, card: tuple[int, int, int]) -> None:
    """Launches depend on sizes alone, and torch only allocates, so CUDA graphs can capture the ops."""
    require("ptx")
    case = case_of(m=m, k=64, ranks=(16, 48, 8))
    for name, kernels in zip(OPS, (FORWARD, BACKWARD), strict=True):
        seen = []
        for groups in ("mixed", "texts", "one", "none"):
            of_rows = 2 if name == "multi_bottleneck" else 3
            args = changed(arguments(case)[name], of_rows, row_group(groups, m, 3))
            with stub_device(card) as launches:
                used = torch_ops(partial(call, name, args))
                seen.append(launches())
            assert used.keys() <= ALLOWED_INSIDE | ZEROED, used
        wanted = [kernel for kernel in kernels if m or kernel != "BottleneckGroups"]
        assert names_of(seen[0]) == wanted, name
        assert all(each == seen[0] for each in seen)


def test_a_launch_for_every_32_adapters() -> None:
    """The last one also has the rows of none."""
    require("ptx")
    for adapters, launched in ((0, 1), (31, 1), (32, 2), (64, 3)):
        args = arguments(case_of(m=40, k=8, ranks=(2,) * adapters))["multi_bottleneck"]
        with stub_device(H100) as launches:
            call("multi_bottleneck", args)
            assert names_of(launches()) == [*LISTED, *["BottleneckGroups"] * launched]


WRONG: dict[str, tuple[str, str, int, Any]] = {
    "groups": ("row_group: expected shape", OPS[0], 2, torch.zeros(8, dtype=torch.int64)),
    "groups-dtype": ("row_group: expected Long or Int, got Float", OPS[0], 2, torch.zeros(9)),
    "residual": ("residual: expected Half", OPS[0], 1, torch.ones(1, 9, 40)),
    "count": ("down: expected 1 of each like it, got 2", OPS[0], 10, ["relu", "relu"]),
    "up": (r"up: expected shape \(40, r\)", OPS[0], 8, [torch.ones(39, 4)]),
    "rank": ("up: expected shape", OPS[0], 8, [torch.ones(40, 5)]),
    "back-dy": ("dy: expected shape", OPS[1], 0, torch.ones(1, 8, 40).half()),
    "back-dy-dtype": ("dy: expected Half", OPS[1], 0, torch.ones(1, 9, 40)),
    "back-z": ("z: expected shape", OPS[1], 2, torch.ones(1, 9, 5)),
    "back-z-dtype": ("z: expected Float", OPS[1], 2, torch.ones(1, 9, 4).half()),
    "back-groups": ("row_group: expected shape", OPS[1], 3, torch.zeros(10, dtype=torch.int64)),
    "back-count": ("down: expected 1 of each like it, got 0", OPS[1], 17, []),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_kernels_check_for_themselves(name: str) -> None:
    """Checks for memory safety in the op itself."""
    require("ptx")
    message, op, at, value = WRONG[name]
    args = arguments(case_of(m=9, ranks=(4,), dtype=torch.float16))[op]
    with testing.running_on("ptx"), pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.peft_kernels_ptx, op)(*changed(args, at, value))


def test_an_x_that_is_no_residual_is_not_read_as_one() -> None:
    require("ptx")
    args = arguments(case_of(m=9, ranks=(4,), beside=True))[OPS[1]]
    with testing.running_on("ptx"), pytest.raises(RuntimeError, match="dy: expected 40 features like x"):
        torch.ops.peft_kernels_ptx.multi_bottleneck_backward(*changed(args, 13, True))
