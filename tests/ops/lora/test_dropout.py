"""dropout on every back end, against masks of an independent Philox."""

from __future__ import annotations

from typing import Any

import philox
import pytest
import torch
from numbers_policy import check_odd_addresses, each_dtype, same_with_any_threads, transposed
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
INF, NAN = float("inf"), float("nan")
SEED = -987654321012345

pytestmark = pytest.mark.usefixtures("nan_outputs")


def dropout_truth(x: Tensor, p: float, seed: int) -> Tensor:
    """In fp32, rounded once."""
    keep = philox.factors(tuple(x.shape), p, seed).float()
    return (x.float() * keep).to(x.dtype)


@each_dtype
@pytest.mark.parametrize("p", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0], ids="p{}".format)
def test_dropout(backend: str, p: float, dtype: torch.dtype) -> None:
    for numel in (0, 1, 2, 3, 4, 5, 63, 64, 65, 129, 1000, 40003):
        x = testing.tensor(numel, dtype=dtype)
        before = x.clone()
        got = ops.dropout(x, p, torch.tensor(SEED))
        assert got.dtype == dtype and torch.equal(got, dropout_truth(x, p, SEED)), f"numel {numel}"
        assert torch.equal(x, before) and (numel == 0 or got.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)], ids="seed{}".format)
def test_dropout_of_any_seed(backend: str, seed: int) -> None:
    x = torch.ones(7, 35)
    for at in (torch.tensor(seed), torch.tensor([seed])):
        got = ops.dropout(x, 0.5, at)
        assert torch.equal(got, dropout_truth(x, 0.5, seed)) and at.item() == seed
        assert torch.equal(ops.dropout(x, 0.5, at), got)


@pytest.mark.parametrize("p", [2.0**-33, 2.0**-32, 0.75 * 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-40])
def test_dropout_near_0_and_1(backend: str, p: float) -> None:
    x = testing.tensor(5000)
    torch.testing.assert_close(ops.dropout(x, p, torch.tensor(3)), dropout_truth(x, p, 3), rtol=1e-6, atol=0)


def test_dropout_threshold(backend: str) -> None:
    """A word equal to the threshold keeps its element, the next smaller one drops it."""
    words = philox.words(4000, 9)
    for at in (0, 17, 3999):
        word = int(words[at])
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False), ((word + 0.25) / 2**32, True)):
            got = ops.dropout(torch.ones(4000), p, torch.tensor(9))
            assert (got[at] != 0).item() is kept, (at, p)
            assert torch.equal(got != 0, philox.kept((4000,), p, 9))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9], ids="p{}".format)
def test_dropout_keep_rate(backend: str, p: float) -> None:
    """Keep rate and mean within 5 standard deviations."""
    count = 200_000
    got = ops.dropout(torch.ones(count), p, torch.tensor(12345))
    rate = (got != 0).double().mean().item()
    assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    assert abs(got.double().mean().item() - 1) < 5 * (p / (1 - p) / count) ** 0.5
    other = ops.dropout(torch.ones(count), p, torch.tensor(12346))
    agreement = p**2 + (1 - p) ** 2
    found = ((got != 0) == (other != 0)).double().mean().item()
    assert abs(found - agreement) < 5 * (agreement * (1 - agreement) / count) ** 0.5


@each_dtype
def test_dropout_of_extreme_values(backend: str, dtype: torch.dtype) -> None:
    """NaN stays, Inf stays if kept, and the largest value overflows when scaled."""
    info = torch.finfo(dtype)
    values = (NAN, INF, -INF, info.max, -info.max, info.smallest_normal, info.tiny * info.eps, -0.0)
    x = torch.tensor(values).to(dtype).repeat(40)
    got = ops.dropout(x, 0.5, torch.tensor(SEED))
    want = dropout_truth(x, 0.5, SEED)
    assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    assert got.isnan().equal(want.isnan()) and got[x.isnan()].isnan().all()


def test_dropout_reads_views(backend: str) -> None:
    """The mask follows the logical order of elements."""
    x, seed = testing.tensor(9, 35), torch.tensor(3)
    want = ops.dropout(x, 0.5, seed)
    for view in (transposed(x), torch.stack((x, x), 2)[..., 1], x.view(3, 3, 35)):
        assert torch.equal(ops.dropout(view, 0.5, seed).reshape(9, 35), want)


@each_dtype
def test_dropout_at_odd_addresses(backend: str, dtype: torch.dtype) -> None:
    x, seed = testing.tensor(24, 64, dtype=dtype), torch.tensor(SEED)
    check_odd_addresses(backend, lambda x: (ops.dropout(x, 0.3, seed),), (x,))


def test_dropout_with_any_threads(backend: str) -> None:
    x = testing.tensor(3, 50001)
    same_with_any_threads(lambda: (ops.dropout(x, 0.3, torch.tensor(5)),))


DROPOUT_REFUSED: dict[str, tuple[str, float, Tensor]] = {
    "p-high": ("dropout_p: expected 0 to 1, got 1.5", 1.5, torch.tensor(1)),
    "p-negative": ("dropout_p: expected 0 to 1, got -0.5", -0.5, torch.tensor(1)),
    "p-nan": ("dropout_p: expected 0 to 1, got nan", NAN, torch.tensor(1)),
    "seed-dtype": ("seed: expected Long, got Double", 0.5, torch.tensor(1.0).double()),
    "seed-elements": ("seed: expected 1 elements, got 0", 0.5, torch.empty(0).long()),
}


@pytest.mark.parametrize("name", DROPOUT_REFUSED)
def test_dropout_refuses(compiled_ops: Any, name: str) -> None:
    message, p, seed = DROPOUT_REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.dropout(torch.ones(3), p, seed)
