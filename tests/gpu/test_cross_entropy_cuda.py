"""The loss of a head on CUDA: chunks, rows that are left out, launches, and the compiled code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from loss_cases import IGNORED, weight_of
from models import tiny_llama
from numbers_policy import at_odd_address, each_dtype
from rounding import BF16
from skips import require
from stub_device import H100, stub_device, torch_ops
from test_cuda_graphs import READS, WAITS, nothing_read
from test_sass import compile_and_read, needs_tools
from torch import Tensor

import peft_kernels as pk
import ptx_backend as ptx
import testing
from bench.gpu import sass
from bench.gpu.sass import Kernel, count
from peft_kernels.ops.loss import token_loss

ROWS, VOCABULARY, FEATURES = 300, 267, 24
"""More rows than the op always computes (cross_entropy_head.cpp), and a vocabulary of incomplete vectors."""
UNIT = 256
"""Rows, or columns, of the smallest chunk."""
FEW_BYTES, MANY_BYTES = 1, 256 << 20


@contextmanager
def in_chunks(extension: ModuleType, logit_bytes: int) -> Iterator[None]:
    extension.set_logit_bytes(logit_bytes)
    try:
        yield
    finally:
        extension.set_logit_bytes(MANY_BYTES)


@contextmanager
def capturing(extension: ModuleType) -> Iterator[None]:
    extension.set_capturing(True)
    try:
        yield
    finally:
        extension.set_capturing(False)


def labels_of(rows: int, every: int) -> Tensor:
    """One row in `every` has a label; the first and the last token are among the labels."""
    labels = torch.full((rows,), IGNORED)
    here = labels[every - 1 :: every]
    here.copy_(torch.arange(here.numel()) * 7 % VOCABULARY)
    here[:2] = torch.tensor([0, VOCABULARY - 1])[: here.numel()]
    return labels


def frozen(base: str, dtype: torch.dtype, labels: Tensor, **changes: Any) -> tuple[Any, ...]:
    """Arguments of linear_cross_entropy with all results."""
    weight = weight_of(base, VOCABULARY, FEATURES, dtype)
    head = (weight, None, None, None, 0) if base == "dense" else weight._state.op_args
    x = testing.tensor(len(labels), FEATURES, dtype=dtype)
    bias = testing.tensor(VOCABULARY, dtype=dtype, seed=3)
    options = {"logit_scale": 1.5, "softcap": 0.0, "label_smoothing": 0.1, "z_loss": 1e-2} | changes
    return (x, *head, VOCABULARY, bias, labels, IGNORED, *options.values(), True, True, True, True)


def trained(dtype: torch.dtype, labels: Tensor) -> tuple[Any, ...]:
    """Arguments of linear_cross_entropy_backward with all gradients."""
    x, *rest = frozen("dense", dtype, labels)
    h, b = testing.tensor(len(labels), 4, seed=4), testing.tensor(VOCABULARY, 4, dtype=dtype, seed=5)
    factors = [testing.tensor(len(labels), seed=seed) for seed in (6, 7, 8)]
    head, options = (x, *rest[:7], h, b), rest[7:-4]
    lse = run("linear_cross_entropy_trained", (*head, *options, False, False, False))[2]
    return (*factors, lse, *head, *options[:-1], *[True] * 5)


def run(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(getattr(torch.ops.peft_kernels_ptx, op)(*args))


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


# Chunks.


@each_dtype
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_chunks_of_rows(extension: ModuleType, dtype: torch.dtype, base: str) -> None:
    args = frozen(base, dtype, labels_of(2 * UNIT + 3, 1))
    whole = run("linear_cross_entropy", args)
    extension.note_launches(False)
    with in_chunks(extension, FEW_BYTES):
        got = judge("linear_cross_entropy", args)
    for g, w in zip(got, whole, strict=True):
        torch.testing.assert_close(g.float(), w.float(), rtol=2 * BF16, atol=2 * BF16)


def test_chunks_of_rows_with_a_label(extension: ModuleType) -> None:
    with in_chunks(extension, FEW_BYTES):
        judge("linear_cross_entropy", frozen("dense", torch.float32, labels_of(2 * UNIT + 6, 2)))


@each_dtype
def test_pieces_of_the_vocabulary(extension: ModuleType, dtype: torch.dtype) -> None:
    args = trained(dtype, labels_of(9, 1))
    with in_chunks(extension, FEW_BYTES):
        judge("linear_cross_entropy_backward", args)
    judge("linear_cross_entropy_backward", args)


def test_pieces_of_a_packed_head(extension: ModuleType) -> None:
    """Its base is dequantised in pieces of its own."""
    dtype = torch.bfloat16
    args = list(trained(dtype, labels_of(9, 1)))
    args[5:10] = weight_of("nested", VOCABULARY, FEATURES, dtype)._state.op_args
    args[-4] = False  # dw
    with in_chunks(extension, FEW_BYTES):
        judge("linear_cross_entropy_backward", tuple(args))


def test_the_budget_bounds_a_chunk(extension: ModuleType) -> None:
    """At its real size: rows of 128,256 logits in 16 bits, and columns of 8192 rows."""
    for args, chunks in (((8192, 128256, 2), 8), ((8192, 128256, 4), 16), ((1200, 32000, 2), 1)):
        rows = extension.logit_chunk(*args)
        assert rows % UNIT == 0 and -(-args[0] // rows) == chunks
        assert rows * args[1] * args[2] <= MANY_BYTES
    assert extension.logit_chunk(10_000, 1 << 30, 2) == UNIT


# Rows without a label.


@each_dtype
def test_rows_without_a_label_are_left_out(extension: ModuleType, dtype: torch.dtype) -> None:
    labels = labels_of(ROWS, 6)
    args, back = frozen("dense", dtype, labels), trained(dtype, labels)
    calls = {
        "linear_cross_entropy": args,
        "linear_cross_entropy_trained": of_forward(back),
        "linear_cross_entropy_backward": back,
    }
    for op, given in calls.items():
        few = judge(op, given)
        with capturing(extension):
            everything = judge(op, given)
        for f, e in zip(few, everything, strict=True):
            torch.testing.assert_close(f.float(), e.float(), rtol=2 * BF16, atol=2 * BF16)
            if len(f) == ROWS:
                ignored = labels == IGNORED
                assert not f[ignored].any() and not e[ignored].any()


def test_nothing_of_a_row_without_a_label_is_used(extension: ModuleType) -> None:
    labels = labels_of(ROWS, 6)
    back = trained(torch.float32, labels)
    x = back[4].clone()
    x[labels == IGNORED] = float("nan")
    for got, want in zip(
        run("linear_cross_entropy_backward", (*back[:4], x, *back[5:])),
        run("linear_cross_entropy_backward", back),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.parametrize("rows", [0, UNIT, UNIT + 1])
def test_no_labels_at_all(extension: ModuleType, rows: int, every: int) -> None:
    labels = torch.full((rows,), IGNORED)
    for result in run("linear_cross_entropy", frozen("dense", torch.bfloat16, labels)):
        assert not result.any()
    for result in run("linear_cross_entropy_backward", trained(torch.bfloat16, labels)):
        assert not result.any()


# Launches, and what waits.


def launched(op: str, args: tuple[Any, ...], logit_bytes: int = MANY_BYTES) -> list[tuple[str, int]]:
    """The kernels of a call, and their blocks."""
    with stub_device(H100) as launches, in_chunks(ptx.BACKEND.extension, logit_bytes):
        launches()
        run(op, args)
        return [(one.kernel.split("<")[0].split("::")[-1], one.blocks) for one in launches()]


def test_launches() -> None:
    """One a chunk, with a block for each row that has a label."""
    require("ptx")
    bf16 = torch.bfloat16
    args, back = frozen("dense", bf16, labels_of(ROWS, 6)), trained(bf16, labels_of(ROWS, 6))
    assert launched("linear_cross_entropy", args) == [("CrossEntropy", ROWS // 6)]
    assert launched("linear_cross_entropy_backward", back) == [("CrossEntropyBackward", ROWS // 6)]
    with capturing(ptx.BACKEND.extension):
        assert launched("linear_cross_entropy", args) == [("CrossEntropy", ROWS)]
    args = frozen("dense", bf16, labels_of(2 * UNIT + 3, 1))
    kernels = launched("linear_cross_entropy", args, FEW_BYTES)
    assert kernels == [("CrossEntropy", UNIT), ("CrossEntropy", UNIT), ("CrossEntropy", 3)]
    assert (
        launched("linear_cross_entropy_backward", back, FEW_BYTES)
        == [("CrossEntropyBackward", ROWS // 6)] * 2
    )


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_cross_entropy_backward"])
def test_a_call_waits_once_and_a_capture_never(op: str) -> None:
    require("ptx")
    made = frozen if op == "linear_cross_entropy" else lambda base, *args: trained(*args)
    many, few = (made("dense", torch.bfloat16, labels_of(rows, 6)) for rows in (UNIT + 1, UNIT))

    def waits(args: tuple[Any, ...]) -> list[str]:
        called = torch_ops(lambda: run(op, args))
        return [name for name in called.elements() if name.removeprefix("aten::") in WAITS | READS]

    with stub_device(H100):
        assert waits(many) == ["aten::nonzero"] and waits(few) == []
        with capturing(ptx.BACKEND.extension):
            assert waits(many) == []


def test_a_step_of_a_patched_model_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    require("ptx")
    model = tiny_llama().to(torch.bfloat16)
    report = pk.patch(model, without=("qkv", "attention", "norms", "residuals"))
    ids = torch.arange(3, 23)[None]
    monkeypatch.setattr(token_loss, "_check_labels", lambda *args: None)  # on a CPU they are read
    with stub_device(H100) as launches:
        model(input_ids=ids, labels=ids).loss.backward()  # one-time set-up
        launches()
        with nothing_read():
            model(input_ids=ids, labels=ids).loss.backward()
        names = [one.kernel.split("<")[0].split("::")[-1] for one in launches()]
    assert names == ["CrossEntropy", "CrossEntropyBackward"] and not report.losses[0].reason


# Values.


@each_dtype
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_long_rows(extension: ModuleType, dtype: torch.dtype, cap: float) -> None:
    """Each thread has several vectors of a row, in loops that are unrolled, and some single logits."""
    vocabulary, features = 5 * 512 * 16 // dtype.itemsize - 13, 8
    weight = testing.tensor(vocabulary, features, dtype=dtype, seed=1)
    x, labels = testing.tensor(12, features, dtype=dtype), torch.arange(12) * (vocabulary - 1) // 11
    labels[3] = IGNORED
    head = (x, weight, None, None, None, 0, vocabulary, None)
    options = labels, IGNORED, 1.0, cap, 0.0, 1e-2
    *scores, _ = judge("linear_cross_entropy", (*head, *options, True, True, True, True))
    for got, want in zip(
        run("linear_cross_entropy", (*head, *options, False, True, True, True)), scores, strict=False
    ):
        assert torch.equal(got, want)
    needs = True, True, False, False, False
    factors = [testing.tensor(12, seed=seed) for seed in (6, 7, 8)]
    back = (*factors, scores[2], *head, None, None, *options[:-1], *needs)
    judge("linear_cross_entropy_backward", back)
    with in_chunks(extension, FEW_BYTES):
        judge("linear_cross_entropy_backward", back)


@each_dtype
def test_any_order_of_threads(extension: ModuleType, dtype: torch.dtype) -> None:
    args, back = frozen("dense", dtype, labels_of(5, 1)), trained(dtype, labels_of(5, 1))
    for op, given in (("linear_cross_entropy", args), ("linear_cross_entropy_backward", back)):
        ptx.BACKEND.check_order(7, lambda op=op, given=given: run(op, given))  # type: ignore[misc]


def test_tensors_at_odd_addresses(extension: ModuleType) -> None:
    args = frozen("dense", torch.bfloat16, labels_of(9, 1))
    want = run("linear_cross_entropy", args)
    odd = tuple(at_odd_address(t) if isinstance(t, Tensor) and t.dtype != torch.int64 else t for t in args)
    for got, expected in zip(run("linear_cross_entropy", odd), want, strict=True):
        assert torch.equal(got, expected)


def test_labels_outside_the_vocabulary(extension: ModuleType) -> None:
    """Their losses are NaN, and nothing beyond the logits is read or written."""
    labels = torch.tensor([1, VOCABULARY, -1, 1 << 40, 2])
    loss, *_, dx = run("linear_cross_entropy", frozen("dense", torch.bfloat16, labels))
    assert loss.isnan().tolist() == dx.isnan().all(1).tolist() == [False, True, True, True, False]


# The compiled code.

PER_LOGIT = {
    r"CrossEntropy<(bf16|fp16), false, (true|false)>": (14.5, 6.0),
    r"CrossEntropy<(bf16|fp16), true, (true|false)>": (19.0, 13.0),
    r"CrossEntropyBackward<(bf16|fp16), false>": (0.0, 10.0),
    r"CrossEntropyBackward<(bf16|fp16), true>": (0.0, 16.0),
}
"""Instructions of a lane per logit at most, without and with a cap: where a row is read, which includes the
label's vector, and where its logits are replaced by gradients."""
WIDE_LOAD, FP64 = r"LDG\.E\.128", r"D(ADD|MUL|FMA|SETP)\b|MUFU\.\w+64"


def loops(kernel: Kernel) -> list[list[Any]]:
    """One iteration of each loop that reads vectors, along the longest path."""
    graph = kernel._graph
    reading = [block for block in kernel.successors if count(kernel._block(block), WIDE_LOAD)]
    paths = [
        graph.best_path(loop, lambda b: (count(kernel._block(b), WIDE_LOAD), len(kernel._block(b))))
        for loop in graph.innermost(reading)
    ]
    return [[i for block in path for i in kernel._block(block)] for path in paths]


@needs_tools
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES, ids=lambda a: f"sm{a}")
def test_instructions_per_logit(architecture: int) -> None:
    files = [file for file in sass.sources() if file.stem == "cross_entropy"]
    found = compile_and_read(files, [architecture], sass.CACHE)
    assert len(found) == 18
    for kernel in found:
        assert not count(kernel.instructions, FP64), kernel.name
        bodies = loops(kernel)
        assert len(bodies) == (2 if re.match(r"CrossEntropy<.*, true>", kernel.name) else 1)
        for body in bodies:
            loads = count(body, WIDE_LOAD)
            assert not count(body, r"LDG\.E(\.U16)?$"), f"{kernel.name}: loads single logits"
            limits = [most for pattern, most in PER_LOGIT.items() if re.fullmatch(pattern, kernel.name)]
            for reading, replacing in limits:  # 16 bits
                most = replacing if count(body, r"STG\.E\.128") else reading
                each = len(body) / (8 * loads)
                assert each <= most, f"{kernel.name}: {each:.2f} instructions per logit, at most {most}"
            # Read: one a vector rescales the sums. A cap takes another exponential.
            width, caps = (8 if limits else 4), 2 if re.search(r"<\w+, true", kernel.name) else 1
            rescaling = 0 if count(body, r"STG\.E\.128") else loads
            assert count(body, r"MUFU\.EX2") == caps * width * loads + rescaling, kernel.name
