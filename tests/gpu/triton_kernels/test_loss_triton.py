"""The loss of a head on back end triton: chunks of rows, pieces of the vocabulary, rows without a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loss_cases import IGNORED, labels_of, weight_of
from numbers_policy import each_dtype
from rounding import BF16
from torch import Tensor

import testing
from peft_kernels.triton_kernels.backend import BACKEND

if testing.unavailable("triton") is not None:
    pytest.skip("for Triton's interpreter (make triton)", allow_module_level=True)

from bench.gpu import triton_calls
from peft_kernels.core.op import Base
from peft_kernels.triton_kernels import loss, loss_head
from peft_kernels.triton_kernels.core import launch
from peft_kernels.triton_kernels.nf4.nf4_weight import nf4

pytestmark = pytest.mark.usefixtures("nan_outputs", "triton_alone")

VOCABULARY, FEATURES, RANK = 300, 32, 4
ROWS = 300
"""More than are computed whether they have a label or not."""
NUMBERS = 1.5, 0.0, 0.1, 1e-2
LONG = 2 * loss.ROW["BLOCK"] + 700
"""A vocabulary of several steps of a row."""


@pytest.fixture
def triton_alone(backend: str) -> None:
    assert backend == "triton"


def run(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(getattr(getattr(torch.ops, BACKEND.namespace), op)(*args))


def few_labels(rows: int = ROWS) -> Tensor:
    labels = torch.full((rows,), IGNORED)
    labels[3::50] = torch.arange(len(labels[3::50])) * 7
    return labels


def frozen(labels: Tensor, dtype: torch.dtype, base: str = "dense", vocabulary: int = VOCABULARY) -> Any:
    """Arguments of linear_cross_entropy with all results."""
    weight = weight_of(base, vocabulary, FEATURES, dtype)
    head = (weight, None, None, None, 0) if base == "dense" else weight._state.op_args
    x = testing.tensor(len(labels), FEATURES, dtype=dtype)
    bias = testing.tensor(vocabulary, dtype=dtype, seed=3)
    return (x, *head, vocabulary, bias, labels, IGNORED, *NUMBERS, True, True, True, True)


def trained(labels: Tensor, dtype: torch.dtype, base: str = "dense", vocabulary: int = VOCABULARY) -> Any:
    """Arguments of linear_cross_entropy_backward with all gradients."""
    x, *rest = frozen(labels, dtype, base, vocabulary)
    h = testing.tensor(len(labels), RANK, seed=4)
    b = testing.tensor(vocabulary, RANK, dtype=dtype, seed=5)
    factors = [testing.tensor(len(labels), seed=seed) for seed in (6, 7, 8)]
    head, options = (x, *rest[:7], h, b), rest[7:-4]
    forward = testing.reference_op("linear_cross_entropy_trained")
    lse = forward(*head, *options, False, False, False)[2]
    return (*factors, lse, *head, *options[:-1], True, base == "dense", True, True, True)


def of_forward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of linear_cross_entropy_trained with all results, given those of its backward."""
    return (*args[4:-5], 1e-2, True, True, True)


def judge(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The results, each checked against the reference in fp64."""
    got, plain = run(op, args), testing.reference_op(op)(*args)
    truth = testing.reference_op(op)(*map(testing.widen, args))
    for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        if g.dtype == torch.bool:
            assert torch.equal(g, p), i
        else:
            testing.assert_close(g, p, t, f"result {i}")
    return got


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels of the loss that were launched since, and their programs."""
    found: list[tuple[str, int]] = []
    original = loss.launch

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
        found.append((kernel.__name__, grid[0]))
        original(kernel, grid, *args, **more)

    monkeypatch.setattr(loss, "launch", noted)
    return found


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fewest logits at a time: 256 rows, or columns."""
    monkeypatch.setattr(loss_head, "LOGIT_BYTES", 1)
    yield


# Chunks.


@each_dtype
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_chunks_of_rows(
    base: str, dtype: torch.dtype, few_bytes: None, launches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loss, "logit_pieces", lambda count, *_: (range(i, min(i + 4, count)) for i in (0, 4, 8))
    )
    judge("linear_cross_entropy", frozen(labels_of(10, VOCABULARY), dtype, base))
    assert launches == [("cross_entropy_kernel", rows) for rows in (4, 4, 2)]


@each_dtype
@pytest.mark.parametrize("base", ["dense", "nested", "plain"])
def test_pieces_of_the_vocabulary(base: str, dtype: torch.dtype, few_bytes: None, launches: Any) -> None:
    args = trained(labels_of(9, VOCABULARY), dtype, base)
    judge("linear_cross_entropy_backward", args)
    assert launches == [("cross_entropy_backward_kernel", 9)] * 2


def test_the_budget_bounds_a_chunk() -> None:
    """At its real size: rows of 128,256 logits in 16 bits, and columns of 8192 rows."""
    for args, chunks in (((8192, 128256, 2), 8), ((8192, 128256, 4), 16), ((1200, 32000, 2), 1)):
        found = list(loss_head.logit_pieces(*args))
        assert len(found) == chunks and sum(map(len, found)) == args[0]
        assert all(len(part) * args[1] * args[2] <= loss_head.LOGIT_BYTES for part in found)


def test_few_rows_do_not_dequantise_a_head_at_once() -> None:
    n, k = 128256, 4096
    x = triton_calls.empty(4, k, dtype=torch.bfloat16)
    with launch.recording(lambda *launched: None):
        head = loss_head.Head(nf4(Base(*triton_calls.nf4(n, k)), n, k), None, n, k)
        sizes = [weight.nbytes for _, weight, _ in head.by_pieces(x, 2)]
    assert sum(sizes) == 2 * n * k and max(sizes) <= loss_head.LOGIT_BYTES


@each_dtype
def test_long_rows(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, LONG - 1, IGNORED, loss.ROW["BLOCK"], *range(100, 3000, 300)])
    judge("linear_cross_entropy", frozen(labels, dtype, vocabulary=LONG))
    judge("linear_cross_entropy_backward", trained(labels, dtype, vocabulary=LONG))


# Rows without a label.


@each_dtype
def test_rows_without_a_label_are_left_out(dtype: torch.dtype, launches: Any) -> None:
    labels = few_labels()
    scored = int((labels != IGNORED).sum())
    back = trained(labels, dtype)
    for op, args in (
        ("linear_cross_entropy", frozen(labels, dtype)),
        ("linear_cross_entropy_trained", of_forward(back)),
        ("linear_cross_entropy_backward", back),
    ):
        launches.clear()
        for t in judge(op, args):
            if len(t) == ROWS and t.numel() and op != "linear_cross_entropy_backward":
                assert not t[labels == IGNORED].any()
        assert [programs for _, programs in launches] == [scored], op


def test_nothing_of_a_row_without_a_label_is_used() -> None:
    """However many rows there are."""
    for rows in (60, ROWS):
        labels = few_labels(rows)
        args, back = frozen(labels, torch.float32), trained(labels, torch.float32)
        x = args[0].clone()
        x[labels == IGNORED] = float("nan")
        for got, want in zip(
            run("linear_cross_entropy", (x, *args[1:])), run("linear_cross_entropy", args), strict=True
        ):
            assert torch.equal(got, want)
        if rows == ROWS:
            got = run("linear_cross_entropy_backward", (*back[:4], x, *back[5:]))
            for one, want in zip(got, run("linear_cross_entropy_backward", back), strict=True):
                assert torch.equal(one, want)


def test_a_capture_computes_all_rows(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = few_labels(loss_head.FEW_ROWS + 1)
    args = frozen(labels, torch.bfloat16)
    few = run("linear_cross_entropy", args)
    monkeypatch.setattr(loss_head, "bypasses_cache", lambda: True)
    for got, want in zip(run("linear_cross_entropy", args), few, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2 * BF16, atol=2 * BF16)
    assert [programs for _, programs in launches] == [int((labels != IGNORED).sum()), len(labels)]


@pytest.mark.parametrize("rows", [0, 3, loss_head.FEW_ROWS + 1])
def test_no_labels_at_all(rows: int) -> None:
    labels = torch.full((rows,), IGNORED)
    for result in run("linear_cross_entropy", frozen(labels, torch.bfloat16)):
        assert len(result) == rows and not result.any()
    back = trained(labels, torch.bfloat16)
    for result in run("linear_cross_entropy_backward", back):
        assert not result.any()


# Values.


def test_labels_outside_the_vocabulary() -> None:
    """Their losses are NaN, and nothing beyond the logits is read or written."""
    labels = torch.tensor([1, VOCABULARY, -1, 1 << 40, 2])
    value, *_, dx = run("linear_cross_entropy", frozen(labels, torch.bfloat16))
    assert value.isnan().tolist() == dx.isnan().all(1).tolist() == [False, True, True, True, False]
