"""lora_linear with dropout, and the masks of one and of several adapters, on every back end."""

from __future__ import annotations

from typing import Any

import numpy as np
import philox
import pytest
import torch
from lora_multi_cases import SCALING, SEED, MultiCase, assert_same, named_gradients, named_outputs
from numbers_policy import DTYPES, case_id, each_dtype, once
from torch import Tensor

import testing

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")


def test_philox_of_the_tests() -> None:
    """The known answers of Random123."""
    answers = {
        (0, 0, 0, 0, 0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (2**32 - 1,) * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            "d16cfe09 94fdcceb 5001e420 24126ea1"
        ),
    }
    for (*counter, k0, k1), answer in answers.items():
        (got,) = philox.philox4x32(np.array([counter]), (k0, k1))
        assert " ".join(f"{int(word):08x}" for word in got) == answer


# lora_linear must be bit-equal to multi_lora_linear, whose tests compare it with fp64.
SINGLE_CASES = testing.pairwise(
    m=(0, 1, 5, 17),
    k=(7, 96, 576),
    n=(1, 33, 100),
    r=(3, 16, 70),
    base=("dense", "nf4", "nested"),
    bs=(32, 64, 4096),
    dtype=DTYPES,
    adapter=("fp32", "same", "mixed"),
    bias=("none", "same", "fp32"),
    layout=("contiguous", "3-d", "column-step", "transposed"),
    p=(0.1, 0.5, 1.0),
    needs=("xab", "xa", "xb", "ab", "x", "a", "b"),
)
each_single_case = pytest.mark.parametrize("case", SINGLE_CASES, ids=case_id)


class SingleCase(MultiCase):
    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        super().__init__(case | {"layers": 1, "adapters": "0", "groups": "none"}, seed)
        bias = self.bias[0] if self.bias[0].numel() else None
        weight = [values[0] for values in self.weights]
        self.adapter = (self.a[0], self.b[0], SCALING[0], self.p[0], self.seed, case.get("compute"))
        self.single_forward_args = (self.x, *weight, bias, *self.adapter)
        self.weight = weight

    def single_backward_args(self, h: Tensor, needs: str) -> tuple[Any, ...]:
        return (self.dy[0], self.x, h, *self.weight, *self.adapter, *(name in needs for name in "xab"))


single_lora_case = once(SingleCase)


@each_single_case
def test_lora_linear_with_dropout(backend: str, case: dict[str, Any]) -> None:
    c = single_lora_case(case)
    y, h = ops.lora_linear(*c.single_forward_args)
    assert_same(named_outputs([y], h), named_outputs(*ops.multi_lora_linear(*c.forward_args)))


@each_single_case
def test_lora_linear_backward_with_dropout(backend: str, case: dict[str, Any]) -> None:
    c, needs = single_lora_case(case), case["needs"]
    h = c.truth["h"].float()
    dx, da, db = ops.lora_linear_backward(*c.single_backward_args(h, needs))
    many = ops.multi_lora_linear_backward(*c.backward_args(h, needs))
    assert_same(named_gradients(c, needs, dx, [da], [db]), named_gradients(c, needs, *many))


def mask_args(
    m: int, k: int, ps: list[float], seed: int, dtype: torch.dtype, row_group: Tensor | None = None
) -> tuple[Any, ...]:
    """x of ones, a base of zeros and identities for A, so that h is exactly each mask."""
    count, eye = len(ps), torch.eye(k)
    x, w = torch.ones(m, k, dtype=dtype), torch.zeros(1, k, dtype=dtype)
    a, b = [eye] * count, [torch.ones(1, k)] * count
    group = list(range(count)) if row_group is not None else [0] * count
    rest = ([0] * count, [1.0] * count, ps, torch.tensor(seed), group, row_group, None)
    return (x, [w], [None], [None], [None], [0], [1], [torch.empty(0)], a, b, *rest)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), SEED], ids="seed{}".format)
@each_dtype
def test_masks_equal_philox(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Stream i for adapter i, bit-equal in forward, dx and dA."""
    m, k, ps = 37, 71, [0.5, 0.25, 0.0, 0.875, 1.0, 2.0**-33]
    args = mask_args(m, k, ps, seed, dtype)
    _, h = ops.multi_lora_linear(*args)
    want = [philox.factors((m, k), p, seed, i).float() for i, p in enumerate(ps)]
    assert torch.equal(h, torch.cat(want, 1))
    # With dy = 1, one row of ones as A, and B = 1, dx is the sum of the masks and dA the row sum of each.
    x, weights, rest = args[0], args[1:6], args[10:]
    a, b = [torch.ones(1, k)] * len(ps), [torch.ones(1, 1)] * len(ps)
    dy, h = [torch.ones(m, 1, dtype=dtype)], torch.zeros(m, len(ps))
    needs = (True, [True] * len(ps), [False] * len(ps))
    dx, da, _ = ops.multi_lora_linear_backward(dy, x, h, *weights, a, b, *rest, *needs)
    assert torch.equal(dx, sum(want).to(dtype))
    for got, mask in zip(da, want, strict=True):
        torch.testing.assert_close(got, mask.sum(0, keepdim=True), rtol=1e-6, atol=0)


def test_a_mask_does_not_depend_on_the_groups(backend: str) -> None:
    """An adapter that serves some rows has the same mask there as one that serves all."""
    m, k, ps = 21, 12, [0.5, 0.5, 0.3]
    row_group = torch.arange(m) // 2 % 4
    _, everything = ops.multi_lora_linear(*mask_args(m, k, ps, SEED, torch.float32))
    _, h = ops.multi_lora_linear(*mask_args(m, k, ps, SEED, torch.float32, row_group))
    for i in range(len(ps)):
        served = (row_group == i)[:, None]
        columns = slice(i * k, (i + 1) * k)
        assert torch.equal(h[:, columns], everything[:, columns] * served), i


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9], ids="p{}".format)
def test_masks_are_independent(backend: str, p: float) -> None:
    """Keep rate, and agreement of two adapters' masks, within 5 standard deviations."""
    m, k = 300, 64
    _, h = ops.multi_lora_linear(*mask_args(m, k, [p] * 3, SEED, torch.float32))
    masks = [part != 0 for part in h.split(k, 1)]
    _, h = ops.multi_lora_linear(*mask_args(m, k, [p], SEED + 1, torch.float32))
    masks.append(h != 0)
    for mask in masks:
        assert abs(mask.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / (m * k)) ** 0.5
    agreement = p**2 + (1 - p) ** 2
    for i in range(4):
        for j in range(i):
            got = (masks[i] == masks[j]).double().mean().item()
            assert abs(got - agreement) < 5 * (agreement * (1 - agreement) / (m * k)) ** 0.5, (i, j)
