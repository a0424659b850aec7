"""Layers of experts on CUDA: kernels are correct for any number of rows, and never read it back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from numbers_policy import short
from skips import require
from stub_device import A100, H100, Launch, stub_device
from test_cuda_graphs import nothing_read
from torch import Tensor

import ptx_backend as ptx
import testing
from peft_kernels import NF4Weight

CARDS = {"A100": (80, 4, 163 << 10), "RTX-3090": (86, 3, 99 << 10), "H100": (90, 7, 227 << 10)}
ENDS = {
    "some": [0, 3, 3, 90, 91],
    "rest": [0, 0, 70, 70, 75],
    "one": [1, 1, 1, 1, 1],
    "none": [0, 0, 0, 0, 0],
    "last": [0, 0, 0, 0, 91],
}
"""Ends of the rows of five experts, of 91 rows."""
ROWS, EXPERTS, SCALING = 91, 5, 0.5
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)


def layer(
    n: int,
    k: int,
    dtype: torch.dtype,
    ends: list[int],
    *,
    r: int = 5,
    adapter: torch.dtype = torch.float32,
    nested: bool = True,
    rows: int = ROWS,
    blocksize: int | None = 64,
    format: str = "nf4",
) -> dict[str, tuple[Any, ...]]:
    """Arguments of the four ops. The weights of experts have different scales."""
    experts = len(ends)
    dense = testing.tensor(experts, n, k, seed=1, scale=k**-0.5) * (1 + torch.arange(experts)).view(-1, 1, 1)
    weight = NF4Weight.quantize(dense, blocksize, nested, format=format)._state.op_args
    x, dy = testing.tensor(rows, k, dtype=dtype, seed=2), testing.tensor(rows, n, dtype=dtype, seed=3)
    a = testing.tensor(experts, r, k, dtype=adapter, seed=4, scale=k**-0.5)
    b = testing.tensor(experts, n, r, dtype=adapter, seed=5)
    bias = testing.tensor(experts, n, dtype=adapter, seed=6)
    at, h = torch.tensor(ends, dtype=torch.int32), testing.tensor(rows, r, seed=7)
    return {
        "experts_linear": (x, at, *weight, n, bias),
        "experts_linear_dx": (dy, at, *weight, k),
        "experts_lora_linear": (x, at, *weight, bias, a, b, SCALING),
        "experts_lora_linear_backward": (dy, x, h, at, *weight, a, b, SCALING, True, True, True),
    }


def call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    found = getattr(torch.ops.peft_kernels, op)(*arguments)
    return found if isinstance(found, tuple) else (found,)


def check_order(seed: int, cases: dict[str, tuple[Any, ...]]) -> None:
    def run() -> list[Tensor]:
        return [result for op, arguments in cases.items() for result in call(op, arguments)]

    ptx.BACKEND.check_order(seed, run)


def check_needs(cases: dict[str, tuple[Any, ...]]) -> None:
    """Checks that each gradient has the same bits alone as with the others."""
    op = "experts_lora_linear_backward"
    arguments, whole = cases[op], call(op, cases[op])
    for i in range(3):
        needs = [i == j for j in range(3)]
        found = call(op, (*arguments[:-3], *needs))
        assert torch.equal(found[i], whole[i])
        assert [f.numel() > 0 for f in found] == needs


def check(op: str, arguments: tuple[Any, ...]) -> None:
    """Checks each result by the numbers policy."""
    reference = testing.reference_op(op)
    truth, plain = reference(*map(testing.widen, arguments)), reference(*arguments)
    if isinstance(truth, Tensor):
        truth, plain = (truth,), (plain,)
    got = call(op, arguments)
    for i, (one, of_torch, true) in enumerate(zip(got, plain, truth, strict=True)):
        if true.dim() == 3:  # adapters: the exact zeros of idle experts would inflate the relative error
            idle = (true == 0).flatten(1).all(1)
            assert not one[idle].any()
            one, of_torch, true = one[~idle], of_torch[~idle], true[~idle]
        testing.assert_close(one, of_torch, true, f"{op}, result {i}")


OPS = tuple(layer(8, 64, torch.bfloat16, [0]))


@HALVES
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows(extension: ModuleType, op: str, ends: str, dtype: torch.dtype) -> None:
    check(op, layer(264, 320, dtype, ENDS[ends])[op])


@HALVES
@pytest.mark.parametrize("adapter", ["fp32", "same"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("r", [4, 16, 70])
@pytest.mark.parametrize("op", OPS[2:])
def test_adapters(
    extension: ModuleType, op: str, r: int, nested: bool, adapter: str, dtype: torch.dtype
) -> None:
    of_adapter = torch.float32 if adapter == "fp32" else dtype
    check(op, layer(48, 128, dtype, ENDS["some"], r=r, nested=nested, adapter=of_adapter)[op])


@HALVES
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("op", OPS)
def test_every_card(extension: ModuleType, op: str, card: str, dtype: torch.dtype) -> None:
    """Wide and narrow tables, small and large tiles, and blocks that share tiles."""
    extension.set_card(*CARDS[card])
    one, few = [130], [0, 1, 1, 3, 5]
    shapes = (72, 704, ENDS["some"]), (72, 704, one), (66, 64, one), (264, 1024, one), (75, 704, few)
    for n, k, ends in shapes:
        check(op, layer(n, k, dtype, ends, rows=ends[-1])[op])


@pytest.mark.parametrize("op", OPS)
def test_more_experts_than_a_warp_has_lanes(extension: ModuleType, op: str) -> None:
    ends = [min(i // 2, 33) for i in range(70)]
    check(op, layer(16, 64, torch.bfloat16, ends, rows=35)[op])


@pytest.mark.parametrize("n,k,blocksize,dtype", [(33, 96, 32, torch.bfloat16), (16, 64, 64, torch.float32)])
@pytest.mark.parametrize("op", OPS)
def test_unsupported_shapes_fall_back(
    extension: ModuleType, op: str, n: int, k: int, blocksize: int, dtype: torch.dtype
) -> None:
    arguments = layer(n, k, dtype, ENDS["some"], blocksize=blocksize)[op]
    check(op, arguments)
    with pytest.raises(AssertionError, match="tolist in a token"), nothing_read():
        call(op, arguments)


@pytest.mark.parametrize("op", OPS[2:])
def test_a_dense_base_falls_back(extension: ModuleType, op: str) -> None:
    arguments = list(layer(48, 128, torch.bfloat16, ENDS["some"])[op])
    at = 2 if op == "experts_lora_linear" else 4
    arguments[at : at + 5] = testing.tensor(EXPERTS, 48, 128, dtype=torch.bfloat16), None, None, None, 0
    check(op, tuple(arguments))


@pytest.mark.parametrize("op", OPS)
def test_experts_without_rows_are_not_read(extension: ModuleType, op: str) -> None:
    """Their NaN scales and NaN adapters do not reach the results."""
    arguments = layer(48, 128, torch.bfloat16, ENDS["some"], nested=False)[op]
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.shape[0] == EXPERTS and argument.is_floating_point():
            argument[0], argument[2] = torch.nan, torch.nan
    for result in call(op, arguments):
        assert result.isfinite().all()


@pytest.mark.parametrize("ends", [[-5, 200, 3, 7, 90], [90, 60, 30, 20, 10], [-1] * 5, [2**31 - 1] * 5])
@pytest.mark.parametrize("op", OPS)
def test_invalid_ends_stay_in_bounds(extension: ModuleType, op: str, ends: list[int]) -> None:
    """Memory is guarded: an access past the end of a tensor is a fault."""
    call(op, layer(48, 128, torch.bfloat16, ends)[op])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("card", CARDS)
def test_order_of_threads_changes_no_bit(extension: ModuleType, card: str, seed: int) -> None:
    """Nor does uninitialised memory: counters are zero again after every call."""
    extension.set_card(*CARDS[card])
    check_order(seed, layer(72, 704, torch.bfloat16, ENDS["some"]))


def test_gradients_do_not_depend_on_which_are_needed(extension: ModuleType) -> None:
    check_needs(layer(72, 704, torch.bfloat16, ENDS["some"]))


# The host's side: launches depend on sizes alone, and nothing is read from the device.

LAUNCHES = {
    "experts_linear": ["ListExpertRows", "ExpertsTiles"],
    "experts_linear_dx": ["ListExpertRows", "ExpertsDx"],
    "experts_lora_linear": ["ListExpertRows", "ExpertsShrink", "ExpertsTiles"],
    "experts_lora_linear_backward": [
        *("ListExpertRows", "ExpertsShrink", "ExpertsDx", "ExpertsOverRows", "ExpertsOverRows"),
    ],
}


@pytest.mark.parametrize("card", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_synchronises(op: str, card: tuple[int, int, int]) -> None:
    require("ptx")
    seen: list[list[Launch]] = []
    for ends in ENDS.values():
        arguments = layer(768, 2048, torch.bfloat16, ends)[op]
        with stub_device(card) as launches:
            call(op, arguments)
            launches()
            with nothing_read():
                call(op, arguments)
            seen.append(launches())
    assert [launch.kernel.split("<")[0].split("::")[-1] for launch in seen[0]] == LAUNCHES[op]
    assert all(each == seen[0] for each in seen)
