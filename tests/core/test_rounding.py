"""The numbers policy itself: what it passes, and what it must not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import rounding
import torch
from moe_routes import on_same_routes
from rounding import assert_close, assert_close_together, judged_over_several_inputs
from torch import Tensor

import testing

DEPTH = 256
Sides = tuple[Tensor, Tensor, Tensor]


def product(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Sides:
    """The kernel adds in another order than torch. Rows differ in size, as those of a head's gradient."""
    x = (
        testing.tensor(rows, DEPTH, dtype=dtype, seed=seed)
        * (1 + 20 * (torch.arange(rows) % 7 == 3))[:, None]
    )
    w = testing.tensor(columns, DEPTH, dtype=dtype, seed=seed + 1)
    x = x.to(dtype)
    got = sum(a @ b.t() for a, b in zip(x.float().split(16, 1), w.float().split(16, 1), strict=True))
    return got.to(dtype), x @ w.t(), x.double() @ w.double().t()


def wrong_element(got: Tensor, truth: Tensor) -> None:
    """By 256 ulp of a typical one. Its bound is 7.6 (2 e + 1) ulp, where e is the RMS error of torch in ulp
    (at most 3.2 for 256 terms), and twice that in a column of large elements."""
    got.view(-1)[77] += 256 * torch.finfo(got.dtype).eps * truth.square().mean().sqrt().item()


FAULTS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "one of 4096 elements by 256 ulp": wrong_element,
    "an unwritten element": lambda got, _: got.view(-1)[5:6].fill_(math.nan),  # type: ignore[dict-item,return-value]
    "an infinite element": lambda got, _: got.view(-1)[5:6].fill_(math.inf),  # type: ignore[dict-item,return-value]
    "all by 1%": lambda got, _: got.mul_(1.01),  # type: ignore[dict-item,return-value]
    "one row by 1%": lambda got, _: got[7].mul_(1.01),  # type: ignore[dict-item,return-value]
    "a column not written": lambda got, _: got[:, -1].zero_(),  # type: ignore[dict-item,return-value]
    "rounded to bf16": lambda got, _: got.copy_(got.bfloat16()),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_fail(fault: str) -> None:
    got, plain, truth = product(64, 64)
    assert_close(got, plain, truth)
    FAULTS[fault](got, truth)
    with pytest.raises(AssertionError):
        assert_close(got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_faults_fail_in_16_bits(dtype: torch.dtype) -> None:
    for spoil in (wrong_element, FAULTS["an unwritten element"], FAULTS["a column not written"]):
        got, plain, truth = product(64, 64, dtype)
        assert_close(got, plain, truth)
        spoil(got, truth)
        with pytest.raises(AssertionError):
            assert_close(got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,columns", [(1, 1), (1, 33), (9, 1), (64, 64)])
def test_other_orders_of_sums_pass_whatever_the_inputs(rows: int, columns: int, dtype: torch.dtype) -> None:
    failed = 0
    for first in range(0, 8_000, 200):

        def run(number: int, first: int = first) -> None:
            assert_close(*product(rows, columns, dtype, first + 2 * number))

        try:
            judged_over_several_inputs(run)
        except AssertionError:
            failed += 1
    assert not failed


def test_errors_of_equal_size_pass_alone() -> None:
    """The bound of single elements allows what normally distributed errors can be."""
    truth = torch.zeros(1000, 100)
    for seed in range(20):
        ours, theirs = (testing.tensor(1000, 100, seed=2 * seed + i) for i in (0, 1))
        assert_close(ours, theirs, truth.double())


def test_few_elements_are_judged_over_several_inputs() -> None:
    runs = []

    def run(number: int, error: float) -> None:
        runs.append(number)
        lucky = 0.0 if number == 0 else 1.0  # torch has no error on the first inputs
        assert_close(torch.tensor([error]), torch.tensor([lucky]), torch.zeros(1).double())

    judged_over_several_inputs(lambda number: run(number, 1.0))
    assert runs == [*range(8)] and rounding.run_number() == 0
    runs.clear()
    with pytest.raises(AssertionError, match="over 64 inputs"):
        judged_over_several_inputs(lambda number: run(number, 2.3))
    runs.clear()
    with pytest.raises(AssertionError, match="over 8 inputs"):
        judged_over_several_inputs(lambda number: run(number, 100.0))


def test_a_wrong_element_of_any_run_fails() -> None:
    def run(number: int) -> None:
        got, plain, truth = product(64, 64, seed=2 * number)
        if number < 2:
            wrong_element(got, truth)
        assert_close(got, plain, truth)

    with pytest.raises(AssertionError, match="flat element 77"):
        judged_over_several_inputs(run)


def test_another_failure_of_a_later_run_does_not_hide_the_first() -> None:
    def run(number: int) -> None:
        assert number == 0, "the fixtures are used up"
        assert_close(torch.ones(1), torch.zeros(1), torch.zeros(1).double())

    with pytest.raises(AssertionError, match="RMS error 1, allowed 0"):
        judged_over_several_inputs(run)


def test_results_of_a_model_count_equally() -> None:
    truth = {"loss": torch.tensor(2.0).double(), "gradient": testing.tensor(50, 40).double()}
    stock = {name: (value * (1 + 1e-3)).float() for name, value in truth.items()}
    assert_close_together({n: (t * (1 + 1.8e-3)).float() for n, t in truth.items()}, stock, truth)
    with pytest.raises(AssertionError):  # of two results one by four times as much
        assert_close_together(stock | {"loss": torch.tensor(2.0 * (1 + 4e-3))}, stock, truth)
    with pytest.raises(AssertionError):
        assert_close_together({"loss": stock["loss"]}, stock, truth)


def test_a_wrong_type_or_shape_fails() -> None:
    got, plain, truth = product(4, 5)
    for wrong in (got.bfloat16(), got[:3], got.view(5, 4)):
        with pytest.raises(AssertionError, match=r"expected torch\.float32"):
            assert_close(wrong, plain, truth)


def test_a_seed_changes_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = testing.tensor(8, seed=3)
    assert torch.equal(before, testing.tensor(8, seed=3))
    monkeypatch.setattr(testing, "SEED", testing.SEED + 1)
    assert not torch.equal(before, testing.tensor(8, seed=3))


def test_later_models_take_the_routes_of_the_first() -> None:
    """With the weights of their own scores."""
    first, second = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]), torch.tensor([[3.0, 2.0, 1.0]] * 2)

    def chosen(scores: Tensor) -> list[list[float]]:
        return [*torch.topk(scores, 1, dim=-1)[0].tolist(), *scores.topk(1)[1].tolist()]

    assert on_same_routes(chosen, first, second) == [[[3.0], [6.0], [2], [0]], [[1.0], [3.0], [2], [0]]]
    assert chosen(second) == [[3.0], [3.0], [0], [0]]
    with pytest.raises(AssertionError, match="no router"):
        on_same_routes(torch.sum, first, second)
