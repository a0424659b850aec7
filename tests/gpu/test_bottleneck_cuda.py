"""Bottleneck adapters on CUDA: which kernels a call launches, and that each path is correct, as PTX."""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from gradient_cases import ACTIVATIONS
from numbers_policy import at_odd_address, case_id, short
from skips import require
from stub_device import A100, FEW, H100, stub_device
from test_bottleneck import check_identity, judge, run, tensors, with_gradients
from torch import Tensor

import peft_kernels as pk
import ptx_backend as ptx
import testing

HALVES = (torch.bfloat16, torch.float16)
FUSED = 32 * FEW[1] - 31
"""Rows for one block per multiprocessor of back end ptx, with one row in the last."""
FORWARD = ["BottleneckRows"]
APART = ["LoraShrink", "BottleneckBetween", "BottleneckExpand"]
APART_BACKWARD = ["LoraShrink", "BottleneckBetween", "LoraExpand"]
PARAMETERS = ["LoraOverRows"] * 2


def case_of(**given: Any) -> dict[str, Any]:
    case = {"activation": "gelu", "norm": False, "beside": False, "biases": True, "dtype": torch.bfloat16}
    return case | {"parameters": "fp32", "p": 0.3, "m": FUSED, "k": 40, "r": 12} | given


def some_cases() -> list[dict[str, Any]]:
    """Every dtype, rows with and without vector loads, and every activation function, combined with the other
    options in turn."""
    ranks = (5, 12, 70, 136, 256)
    cases = []
    for i, (dtype, k, activation) in enumerate(product(HALVES, (104, 45), ACTIVATIONS)):
        cases.append(
            case_of(
                dtype=dtype, k=k, activation=activation, r=ranks[i % 5], biases=i % 3 != 1,
                parameters=("fp32", "same")[(i + i // 4) % 2], p=(0.3, 0.0, 1.0)[i % 3] if i % 7 else 0.3,
                m=(FUSED, FUSED + 31, FUSED + 17)[i % 3], beside=i % 4 == 2,
            )
        )  # fmt: skip
    # The maximum number of rank tiles, also with bf16 adapters.
    cases.append(case_of(k=104, r=256, activation="silu"))
    cases.append(case_of(k=104, r=256, parameters="same", beside=True))
    return cases


@pytest.mark.parametrize("case", some_cases(), ids=case_id)
def test_the_fused_kernel_is_correct(extension: ModuleType, case: dict[str, Any]) -> None:
    judge(case)


@pytest.mark.parametrize("path", ["few-rows", "many-ranks"])
@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_lora_kernels_are_correct(extension: ModuleType, dtype: torch.dtype, path: str) -> None:
    for k, parameters in ((64, "same"), (33, "fp32")):
        size = {"m": FUSED - 1, "r": 20} if path == "few-rows" else {"m": FUSED, "r": 261}
        judge(case_of(dtype=dtype, k=k, parameters=parameters, beside=k == 64, **size))


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_zero_up_is_the_exact_identity(extension: ModuleType, dtype: torch.dtype) -> None:
    """In the fused kernel."""
    check_identity(FUSED, True, dtype)


@pytest.mark.parametrize("m", [9, FUSED], ids=["apart", "fused"])
def test_zeros_hide_no_nan(extension: ModuleType, m: int) -> None:
    """NaN spreads over its row, but not to other rows."""
    x, down, up = (
        testing.tensor(m, 40, dtype=torch.bfloat16),
        testing.tensor(5, 40, seed=1),
        torch.zeros(40, 5),
    )
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    for p in (0.0, 1.0):
        y = pk.bottleneck(x, down, up, dropout_p=p)
        assert y[1].isnan().all() and y[2].isnan().any()
        assert torch.equal(y[3:], x[3:]) and torch.equal(y[0], x[0])


@pytest.mark.parametrize("m", [9, FUSED], ids=["apart", "fused"])
@pytest.mark.parametrize("beside", [False, True], ids=["behind", "beside"])
def test_a_gradient_does_not_depend_on_which_others_are_needed(
    extension: ModuleType, m: int, beside: bool
) -> None:
    case = case_of(m=m, beside=beside, dtype=torch.float16)
    t: Any = tensors(case)

    def gradients(trained: list[str]) -> dict[str, Tensor]:
        leaves = {name: t[name].clone().requires_grad_() for name in trained}
        y = run(torch.ops.peft_kernels.bottleneck, t | leaves, case)
        dy = testing.tensor(*y.shape, dtype=y.dtype, seed=9)
        return dict(zip(trained, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

    names = [name for name, value in t.items() if value is not None]
    everything = gradients(names)
    for name in names:
        assert torch.equal(gradients([name])[name], everything[name]), name


@pytest.mark.parametrize("m", [9, FUSED], ids=["apart", "fused"])
def test_any_address_and_any_order_of_threads(extension: ModuleType, m: int) -> None:
    """The same bits: vector loads and loads of single elements give the same results."""
    case = case_of(m=m, k=48, r=20, beside=True)
    case |= {"parameters": "same"}
    t: Any = tensors(case)

    def results(t: Any) -> list[Tensor]:
        return list(
            with_gradients(
                lambda t: run(torch.ops.peft_kernels.bottleneck, t, case), t, t["x"].dtype
            ).values()
        )

    want = results(t)
    ptx.BACKEND.check_order(7, lambda: results(t))
    for name, value in t.items():
        if value is None:
            continue
        for got, expected in zip(results(t | {name: at_odd_address(value)}), want, strict=True):
            assert torch.equal(got, expected), name


def launched(
    m: int, k: int, r: int, card: tuple[int, int, int], **options: Any
) -> tuple[list[str], list[str]]:
    """The kernels of a call and of its backward."""
    dtype, norm = options.get("dtype", torch.bfloat16), options.get("norm", False)
    t = [torch.ones(*s, requires_grad=True) for s in ((r, k), (k, r), (r,), (k,))]
    x = torch.ones(m, k, dtype=dtype, requires_grad=True)
    with stub_device(card) as launches:
        weight = torch.ones(k) if norm else None
        y = pk.bottleneck(x, *t, norm_weight=weight)
        forward = names_of(launches())
        torch.autograd.grad(y, (x, *t), torch.ones_like(y))
        return forward, names_of(launches())


def names_of(launches: Any) -> list[str]:
    return [launch.kernel.split("<")[0].split("::")[-1] for launch in launches]


@pytest.mark.parametrize("card", [A100, H100], ids=["A100", "H100"])
def test_launches(card: tuple[int, int, int]) -> None:
    """By rows and ranks; fp32 and layer norms use none of our kernels."""
    require("ptx")
    enough = 32 * card[1] - 31
    assert launched(enough, 48, 256, card) == (FORWARD, FORWARD + PARAMETERS)
    for m, r in ((enough - 1, 16), (enough, 257)):
        assert launched(m, 48, r, card) == (APART, APART_BACKWARD + PARAMETERS)
    assert launched(enough, 48, 16, card, dtype=torch.float32) == ([], [])
    assert launched(enough, 48, 16, card, norm=True) == ([], [])
