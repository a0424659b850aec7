"""The experts' ops on every back end by the numbers policy, and against ops of single layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts_cases import (
    LONG,
    MANY,
    SCALING,
    SPLITS,
    STRIDES,
    ExpertsCase,
    check_experts_linear,
    check_experts_linear_dx,
    check_experts_lora_linear,
    check_experts_lora_linear_backward,
    ends_of,
    runs,
)
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import BEYOND_FP16, each_sum
from numbers_policy import (
    DTYPES,
    FEATURES,
    assert_in_range,
    assert_within_rounding,
    case_id,
    each_dtype,
    pairs,
    same_with_any_threads,
    short,
)
from torch import Tensor

import peft_kernels as pk
import testing

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")

# x is a matrix: there are no leading dimensions.
LAYOUTS = tuple(layout for layout in testing.LAYOUTS if layout != "3-d")
NO_ADAPTER = {"r": 1, "adapter": "fp32", "strides": "contiguous"}

LINEAR_CASES = testing.pairwise(
    split=tuple(SPLITS),
    n=FEATURES,
    k=FEATURES,
    bs=(32, 64, 128, 4096),
    base=("nf4", "nested"),
    dtype=DTYPES,
    bias=("none", "same", "fp32"),
    layout=LAYOUTS,
)
each_linear_case = pytest.mark.parametrize("case", LINEAR_CASES, ids=case_id)

LORA_CASES = testing.pairwise(
    split=tuple(SPLITS),
    n=FEATURES,
    k=FEATURES,
    r=(1, 3, 8, 16, 33),
    base=("dense", "nf4", "nested"),
    bs=(32, 64, 128, 4096),
    dtype=DTYPES,
    adapter=("fp32", "same", "mixed"),
    strides=tuple(STRIDES),
    bias=("none", "same", "fp32"),
    layout=LAYOUTS,
    needs=("xab", "xa", "xb", "ab", "x", "a", "b"),
)
each_lora_case = pytest.mark.parametrize("case", LORA_CASES, ids=case_id)


@each_linear_case
def test_experts_linear(backend: str, case: dict[str, Any]) -> None:
    check_experts_linear(case | NO_ADAPTER)


@each_linear_case
def test_experts_linear_dx(backend: str, case: dict[str, Any]) -> None:
    check_experts_linear_dx(case | NO_ADAPTER)


def needs_right_products(backend: str, case: dict[str, Any]) -> None:
    """Skips what this torch computes wrongly: 2.9 reads a row of fp16 on CPUs as if it were contiguous."""
    if backend == "reference" and case["dtype"] == torch.float16 and case["layout"] == "transposed":
        row, weight = torch.arange(1.0, 33.0).half().view(16, 2).t()[:1], torch.ones(576, 16).half()
        if not torch.equal(torch.nn.functional.linear(row, weight), torch.full((1, 576), 256.0).half()):
            pytest.skip("this torch multiplies a strided row of fp16 wrongly")


@each_lora_case
def test_experts_lora_linear(backend: str, case: dict[str, Any]) -> None:
    needs_right_products(backend, case)
    check_experts_lora_linear(case)


@each_lora_case
def test_experts_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    needs_right_products(backend, case)
    check_experts_lora_linear_backward(case)


def sizes(
    split: str | tuple[int, ...], n: int, k: int, base: str, dtype: torch.dtype, adapter: str = "fp32"
) -> dict[str, Any]:
    of_adapter = {"r": 8, "adapter": adapter, "strides": "peft"}
    rest = {"bs": 64, "base": base, "dtype": dtype, "bias": "none", "layout": "contiguous"}
    return {"split": split, "n": n, "k": k} | of_adapter | rest


@pytest.mark.parametrize("large", BEYOND_FP16)
@pytest.mark.parametrize("split", ["decode", "uneven"])
def test_ranks_beyond_fp16(backend: str, split: str, large: str) -> None:
    c = ExpertsCase(sizes(split, 128, 192, "nested", torch.float16) | BEYOND_FP16[large])
    y, h = ops.experts_lora_linear(*c.forward_args)
    dx, da, db = ops.experts_lora_linear_backward(*c.backward_args(h))
    assert_in_range({"y": y, "dx": dx, "da": da, "db": db}, c, 192 + 8)


@pytest.mark.parametrize("n,k", [(0, 64), (5, 0)], ids=["no-outputs", "no-inputs"])
def test_empty_weights(backend: str, n: int, k: int) -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(3, n, k), 32)
    group, bias, ends = weight._state.op_args, testing.tensor(3, n), ends_of(SPLITS["all-behind"]) + 2
    x, dy, a, b = (testing.tensor(*shape) for shape in ((6, k), (6, n), (3, 4, k), (3, n, 4)))
    want = torch.cat([bias[:1].expand(2, n), torch.zeros(4, n)])
    assert torch.equal(ops.experts_linear(x, ends, *group, n, bias), want)
    assert torch.equal(ops.experts_linear_dx(dy, ends, *group, k), torch.zeros(6, k))
    y, h = ops.experts_lora_linear(x, ends, *group, bias, a, b, 1.0)
    assert y.shape == (6, n) and h.shape == (6, 4) and h.isfinite().all()
    found = ops.experts_lora_linear_backward(dy, x, h, ends, *group, a, b, 1.0, True, True, True)
    for got, like in zip(found, (x, a, b), strict=True):
        assert got.shape == like.shape and got.isfinite().all()


@given(
    split=st.lists(st.one_of(st.just(0), st.integers(0, 80)), min_size=2, max_size=7),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    r=st.integers(1, 20),
    bs=st.sampled_from((32, 64, 128, 1024, 4096)),
    base=st.sampled_from(("dense", "nf4", "nested")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    adapter=st.sampled_from(("fp32", "same", "mixed")),
    strides=st.sampled_from(tuple(STRIDES)),
)
def test_any_shape(backend: str, split: list[int], **case: Any) -> None:
    c = ExpertsCase(case | {"split": split, "bias": "none"})
    y, h = ops.experts_lora_linear(*c.forward_args)
    dx, da, db = ops.experts_lora_linear_backward(*c.backward_args(c.truth["h"].float()))
    got = {"y": y, "h": h, "dx": dx, "da": da, "db": db}
    if case["base"] != "dense":
        got |= {"linear": ops.experts_linear(*c.linear_args), "linear_dx": ops.experts_linear_dx(*c.dx_args)}
    depth = max(sum(split), case["n"], case["k"]) + case["r"]
    for name, value in got.items():
        assert_within_rounding(value, c.truth[name], c.magnitude[name], depth, name)


def everything(c: ExpertsCase) -> dict[str, Tensor]:
    y, h = ops.experts_lora_linear(*c.forward_args)
    dx, da, db = ops.experts_lora_linear_backward(*c.backward_args(h))
    found = {"y": y, "h": h, "dx": dx, "da": da, "db": db}
    if c.group[1] is not None:
        found |= {
            "linear": ops.experts_linear(*c.linear_args),
            "linear_dx": ops.experts_linear_dx(*c.dx_args),
        }
    return found


@pairs(
    split=("gaps", "decode", "uneven", LONG),
    base=("dense", "nf4", "nested"),
    types=(*((dtype, "fp32") for dtype in DTYPES), (torch.bfloat16, "same"), (torch.bfloat16, "mixed")),
    shape=((136, 320), (33, 71)),  # whole blocks, odd
)
def test_an_expert_is_a_layer_to_the_bit(
    backend: str,
    split: str | tuple[int, ...],
    base: str,
    types: tuple[torch.dtype, str],
    shape: tuple[int, int],
) -> None:
    if backend in ("ptx", "triton"):
        pytest.skip(f"{backend}: many experts' sums need not be in the order of one layer's")
    n, k = shape
    c = ExpertsCase(sizes(split, n, k, base, *types) | {"bias": "same"})
    got = everything(c)
    for e, rows in runs(c.ends):
        of_layer = tuple(None if t is None else t[e] for t in c.group[:4]) + c.group[4:]
        x, dy, bias, a, b = c.x[rows], c.dy[rows], c.bias[e], c.a[e], c.b[e]
        rest = SCALING, 0.0, None, None
        y, h = ops.lora_linear(x, *of_layer, bias, a, b, *rest)
        dx, da, db = ops.lora_linear_backward(dy, x, h, *of_layer, a, b, *rest, True, True, True)
        want = {"y": y, "h": h, "dx": dx, "da": da, "db": db}
        if base != "dense":
            want["linear"] = ops.nf4_linear(x, *of_layer, n, bias)
            want["linear_dx"] = ops.nf4_linear_dx(dy, *of_layer, k)
        for name, value in want.items():
            part = got[name][e] if name in ("da", "db") else got[name][rows]
            assert torch.equal(part, value), f"expert {e}: {name}"


def test_rows_of_no_expert_are_zero(backend: str) -> None:
    """Rows after the last end, and gradients of experts without rows."""
    c = ExpertsCase(sizes("gaps", 33, 96, "nested", torch.float32) | {"bias": "same"})
    got = everything(c)
    for name in ("y", "h", "dx", "linear", "linear_dx"):
        assert torch.equal(got[name][17:], torch.zeros_like(got[name][17:])), name
        assert got[name][:17].any(1).all(), name
    for name in ("da", "db"):
        assert [bool(one.any()) for one in got[name]] == [False, True, False, True], name


@pytest.mark.parametrize("adapter", ["fp32", "same", "mixed"])
@pytest.mark.parametrize("swapped", [False, True], ids=["as-they-are", "swapped"])
def test_the_layout_of_adapters_changes_no_bit(backend: str, adapter: str, swapped: bool) -> None:
    """More experts and elements than a block of the copy, with gaps; `swapped`: A and B as swapped by
    PEFT."""
    if backend in ("ptx", "triton"):
        pytest.skip(f"{backend}: too many elements for an interpreter")
    if backend == "reference":
        pytest.skip("reference: torch's own matmul sums in another order where a matrix lies in another")
    split = (*(i % 3 for i in range(37)), 1, 1, 9, 0, 2)
    c = ExpertsCase(sizes(split, 70, 65, "nf4", torch.bfloat16, adapter) | {"strides": "contiguous"})
    want = everything(c)
    a, b = c.a, c.b
    for name in ("peft", "transposed"):
        c.a, c.b = (STRIDES[name](t.mT).mT if swapped else STRIDES[name](t) for t in (a, b))
        for result, got in everything(c).items():
            assert torch.equal(got, want[result]), f"{name}: {result}"


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_flags_do_not_change_a_bit(backend: str, base: str) -> None:
    c = ExpertsCase(sizes("gaps", 33, 100, base, torch.bfloat16))
    _, h = ops.experts_lora_linear(*c.forward_args)
    every = ops.experts_lora_linear_backward(*c.backward_args(h))
    for needs in ("", "x", "a", "b", "xa", "xb", "ab"):
        found = ops.experts_lora_linear_backward(*c.backward_args(h, needs))
        for name, got, want in zip("xab", found, every, strict=True):
            assert torch.equal(got, want) if name in needs else got.shape == (0,), f"needs {needs!r}: {name}"


@each_dtype
def test_a_bad_row_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    clean, bad = (ExpertsCase(sizes("uneven", 33, 71, "nested", dtype)) for _ in range(2))
    row, others = 70, [i for i in range(80) if i != 70]  # expert 1's only one
    bad.x[row], bad.dy[row] = float("inf"), float("nan")
    want, got = everything(clean), everything(bad)
    for name in ("y", "h", "dx", "linear", "linear_dx"):
        assert not got[name][row].isfinite().any(), name
        if backend == "reference":
            assert got[name][others].isfinite().all(), name
        else:
            assert torch.equal(got[name][others], want[name][others]), name
    for name in ("da", "db"):
        assert not got[name][1].isfinite().all() and torch.equal(got[name][3], want[name][3]), name


@pytest.mark.parametrize("split,base", [("decode", "nested"), ("uneven", "dense"), ("uneven", "nested")])
@each_sum
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype, adapter: str, base: str, split: str) -> None:
    """Also after the scratch memory held NaN: nothing of an earlier call may be read."""
    # Interpreted, they take long. These are still several tiles each.
    n, k = (72, 160) if backend == "triton" else (136, 320)
    c = ExpertsCase(sizes(split, n, k, base, dtype, adapter))
    inputs = [c.x, c.dy, c.a, c.b, c.ends, *(t for t in c.group if isinstance(t, Tensor))]
    before = [t.clone() for t in inputs]
    first = everything(c)
    poisoned = ExpertsCase(sizes("uneven", n, k, base, dtype, adapter))
    for t in (poisoned.x, poisoned.dy, poisoned.a, poisoned.b):
        t.fill_(float("nan"))
    everything(poisoned)
    for name, got in everything(c).items():
        assert got.isfinite().all() and torch.equal(got, first[name]), name
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"


@pytest.mark.parametrize(
    "split", [SPLITS["decode"], SPLITS["uneven"], MANY], ids=["decode", "uneven", "many"]
)
@each_sum
def test_threads_do_not_change_a_bit(
    backend: str, dtype: torch.dtype, adapter: str, split: tuple[int, ...]
) -> None:
    if backend in ("reference", "ptx", "triton"):
        pytest.skip(f"{backend}: torch's own matmul may split sums by threads")
    c = ExpertsCase(sizes(split, 200, 192, "nested", dtype, adapter))
    found = same_with_any_threads(lambda: everything(c).values())
    for name, value in zip(("y", "h", "dx"), found, strict=False):
        assert_within_rounding(value, c.truth[name], c.magnitude[name], 208, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_gradients_reach_the_leaves(backend: str, dtype: torch.dtype) -> None:
    """With PEFT's layout of lora_B, which the gradient of its parameter must fit."""
    weight = pk.NF4Weight.quantize(testing.tensor(4, 33, 96, seed=3), 32)
    x, dy, ends = (
        testing.tensor(20, 96, dtype=dtype),
        testing.tensor(20, 33, dtype=dtype),
        ends_of(SPLITS["gaps"]),
    )
    x.requires_grad_()
    a = testing.tensor(4 * 8, 96, seed=4).requires_grad_()  # PEFT's lora_A and lora_B
    b = testing.tensor(33, 8 * 4, seed=5).requires_grad_()
    of_experts = a.view(4, 8, 96), b.view(33, 8, 4).permute(2, 0, 1)
    pk.experts_lora_linear(x, ends, weight, *of_experts, SCALING).backward(dy)
    detached = [t.detach() for t in of_experts]
    _, h = ops.experts_lora_linear(x.detach(), ends, *weight._state.op_args, None, *detached, SCALING)
    dx, da, db = ops.experts_lora_linear_backward(
        dy, x.detach(), h, ends, *weight._state.op_args, *detached, SCALING, True, True, True
    )
    assert torch.equal(x.grad, dx) and torch.equal(a.grad, da.view(32, 96))
    assert torch.equal(b.grad, db.permute(1, 2, 0).reshape(33, 32))
    x.grad = None
    pk.experts_linear(x, ends, weight).backward(dy)
    assert torch.equal(x.grad, ops.experts_linear_dx(dy, ends, *weight._state.op_args, 96))
