"""nf4_linear, lora_linear and their backward ops by the numbers policy, on every back end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbers_policy import (
    DTYPES,
    FEATURES,
    Result,
    assert_within_rounding,
    bias_of,
    case_id,
    check,
    dense64,
    same_with_any_threads,
    short,
)
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
ROWS = (0, 1, 2, 5, 17, 64, 130)


pytestmark = pytest.mark.usefixtures("nan_outputs")


def weight_of(case: dict[str, Any], seed: int) -> Any:
    return testing.nf4_weight(case["n"], case["k"], case["bs"], case["nested"], seed=seed + 1)


# The frozen base alone

LINEAR_CASES = testing.pairwise(
    m=ROWS,
    n=FEATURES,
    k=FEATURES,
    bs=(32, 64, 128, 4096),
    nested=(True, False),
    dtype=DTYPES,
    bias=("none", "same", "fp32"),
    layout=testing.LAYOUTS,
)
each_linear_case = pytest.mark.parametrize("case", LINEAR_CASES, ids=case_id)


def check_nf4_linear(case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        weight, bias = weight_of(case, seed), bias_of(case, case["bias"], case["n"])
        x = testing.activations(case["m"], case["k"], case["layout"], case["dtype"], seed)
        args = (x, *weight._state.op_args, case["n"], bias)
        w, b = dense64(weight), torch.zeros(case["n"]).double() if bias is None else bias.double()
        truth, magnitude = x.double() @ w.t() + b, x.double().abs() @ w.abs().t() + b.abs()
        return {
            "y": Result(ops.nf4_linear(*args), testing.reference_op("nf4_linear")(*args), truth, magnitude)
        }

    check(run, case["k"])


def check_nf4_linear_dx(case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        weight = weight_of(case, seed)
        dy = testing.activations(case["m"], case["n"], case["layout"], case["dtype"], seed)
        args = (dy, *weight._state.op_args, case["k"])
        got, plain = ops.nf4_linear_dx(*args), testing.reference_op("nf4_linear_dx")(*args)
        w = dense64(weight)
        return {"dx": Result(got, plain, dy.double() @ w, dy.double().abs() @ w.abs())}

    check(run, case["n"])


@each_linear_case
def test_nf4_linear(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear(case)


@each_linear_case
def test_nf4_linear_dx(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear_dx(case)


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 0, 96), (2, 3, 96), (2, 1, 3, 96)], ids=str)
def test_nf4_linear_keeps_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    weight = testing.nf4_weight(33, 96)
    x = testing.tensor(*shape)
    y = ops.nf4_linear(x, *weight._state.op_args, 33, None)
    assert y.shape == (*shape[:-1], 33)
    testing.assert_close(y, y, x.double() @ dense64(weight).t())
    dy = testing.tensor(*shape[:-1], 33)
    dx = ops.nf4_linear_dx(dy, *weight._state.op_args, 96)
    assert dx.shape == shape
    testing.assert_close(dx, dy @ weight.dequantize(), dy.double() @ dense64(weight))


@pytest.mark.parametrize("n,k", [(0, 64), (5, 0), (0, 0)], ids=["no-rows", "no-columns", "nothing"])
def test_empty_weights(backend: str, n: int, k: int) -> None:
    weight, bias = testing.nf4_weight(n, k), testing.tensor(n)
    x, dy = testing.tensor(3, k), testing.tensor(3, n)
    assert torch.equal(ops.nf4_linear(x, *weight._state.op_args, n, bias), bias.expand(3, n))
    assert torch.equal(ops.nf4_linear_dx(dy, *weight._state.op_args, k), torch.zeros(3, k))
    a, b = testing.tensor(4, k), testing.tensor(n, 4)
    y, h = ops.lora_linear(x, *weight._state.op_args, bias, a, b, 1.0, 0.0, None, None)
    assert y.shape == (3, n) and h.shape == (3, 4)
    dx, da, db = ops.lora_linear_backward(
        dy, x, h, *weight._state.op_args, a, b, 1.0, 0.0, None, None, True, True, True
    )
    assert dx.shape == x.shape and da.shape == a.shape and db.shape == b.shape
    assert dx.isfinite().all() and da.isfinite().all() and db.isfinite().all()


# Base and adapter

LORA_CASES = testing.pairwise(
    m=ROWS,
    n=FEATURES,
    k=FEATURES,
    r=(1, 3, 8, 16, 33),
    base=("dense", "nf4", "nested"),
    bs=(32, 64, 128, 4096),
    dtype=DTYPES,
    adapter=("fp32", "same", "mixed"),
    bias=("none", "same", "fp32"),
    layout=testing.LAYOUTS,
    needs=("xab", "xa", "xb", "ab", "x", "a", "b"),
)
each_lora_case = pytest.mark.parametrize("case", LORA_CASES, ids=case_id)
SCALING = 1.7


def lora_case(m: int, n: int, k: int, base: str, dtype: torch.dtype) -> dict[str, Any]:
    sizes = {"m": m, "n": n, "k": k, "r": 8, "bs": 64}
    return sizes | {"base": base, "dtype": dtype, "adapter": "fp32", "bias": "none", "layout": "contiguous"}


class LoraCase:
    """The inputs of one case, and the truth in fp64 by formulas of its own."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        m, n, k, r, dtype = (case[name] for name in ("m", "n", "k", "r", "dtype"))
        a_dtype = dtype if case["adapter"] == "same" else torch.float32
        b_dtype = torch.float32 if case["adapter"] == "fp32" else dtype
        self.x = testing.activations(m, k, case["layout"], dtype, seed)
        self.dy = testing.activations(m, n, case["layout"], dtype, seed + 2)
        self.a = testing.tensor(r, k, dtype=a_dtype, seed=seed + 3, scale=k**-0.5)
        self.b = testing.tensor(n, r, dtype=b_dtype, seed=seed + 4, scale=r**-0.5)
        self.bias = bias_of(case, case["bias"], n)
        if case["base"] == "dense":
            dense = testing.tensor(n, k, dtype=dtype, seed=seed + 1, scale=k**-0.5)
            self.group: tuple[Any, ...] = (dense, None, None, None, 0)
            self.w = dense.double()
        else:
            weight = testing.nf4_weight(n, k, case["bs"], case["base"] == "nested", seed=seed + 1)
            self.group, self.w = weight._state.op_args, dense64(weight)
        self.forward_args = (self.x, *self.group, self.bias, self.a, self.b, SCALING, 0.0, None, None)

    def backward_args(self, h: Tensor, needs: str = "xab") -> tuple[Any, ...]:
        flags = tuple(name in needs for name in "xab")
        return (self.dy, self.x, h, *self.group, self.a, self.b, SCALING, 0.0, None, None, *flags)

    def products(self, widen: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """y, h, dx, da, db; with `widen` the absolute value, the sums of absolute terms."""
        x, dy, a, b, w = (widen(t.double()) for t in (self.x, self.dy, self.a, self.b, self.w))
        x2, dy2 = x.flatten(0, -2), dy.flatten(0, -2)
        h, dh = x @ a.t(), SCALING * dy @ b
        y = x @ w.t() + SCALING * h @ b.t()
        return {
            "y": y if self.bias is None else y + widen(self.bias.double()),
            "h": h,
            "dx": dy @ w + dh @ a,
            "da": dh.flatten(0, -2).t() @ x2,
            "db": SCALING * dy2.t() @ h.flatten(0, -2),
        }


def check_lora_linear(case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        c = LoraCase(case, seed)
        truth, magnitude = c.products(lambda t: t), c.products(torch.abs)
        y, h = ops.lora_linear(*c.forward_args)
        plain_y, plain_h = testing.reference_op("lora_linear")(*c.forward_args)
        return {
            "y": Result(y, plain_y, truth["y"], magnitude["y"]),
            "h": Result(h, plain_h, truth["h"], magnitude["h"]),
        }

    check(run, case["k"] + case["r"])


def check_lora_linear_backward(case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        c = LoraCase(case, seed)
        truth, magnitude = c.products(lambda t: t), c.products(torch.abs)
        h = truth["h"].float()
        got = ops.lora_linear_backward(*c.backward_args(h, case["needs"]))
        # Of contiguous tensors: of rows expanded from one, torch has sums that nobody else's can match.
        c.x, c.dy = c.x.contiguous(), c.dy.contiguous()
        plain = testing.reference_op("lora_linear_backward")(*c.backward_args(h))
        results = {}
        for need, name, like, g, p in zip(
            "xab", ("dx", "da", "db"), (c.x, c.a, c.b), got, plain, strict=True
        ):
            assert g.dtype == like.dtype, name
            assert g.shape == (like.shape if need in case["needs"] else (0,)), name
            if need in case["needs"]:
                results[name] = Result(g, p, truth[name], magnitude[name])
        return results

    check(run, max(case["m"], case["n"], case["k"]) + case["r"])


@each_lora_case
def test_lora_linear(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear(case)


@each_lora_case
def test_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear_backward(case)


LONG = {"m17-n4096-k64": (17, 4096, 64), "m17-n64-k4096": (17, 64, 4096), "m3000-n32-k48": (3000, 32, 48)}


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_long_sums(backend: str, dtype: torch.dtype, shape: str) -> None:
    """Thousands of terms: one fp32 chain drifts where plain torch's blocked sums do not."""
    m, n, k = LONG[shape]
    case = lora_case(m, n, k, "nested", dtype) | {"nested": True, "needs": "xab"}
    check_nf4_linear(case)
    check_nf4_linear_dx(case)
    check_lora_linear(case)
    check_lora_linear_backward(case)


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_lora_backward_flags_do_not_change_a_bit(backend: str, base: str) -> None:
    c = LoraCase(lora_case(17, 33, 100, base, torch.bfloat16))
    _, h = ops.lora_linear(*c.forward_args)
    everything = ops.lora_linear_backward(*c.backward_args(h))
    for needs in ("", "x", "a", "b", "xa", "xb", "ab"):
        for name, got, want in zip(
            "xab", ops.lora_linear_backward(*c.backward_args(h, needs)), everything, strict=True
        ):
            assert torch.equal(got, want) if name in needs else got.shape == (0,), f"needs {needs!r}: {name}"


# Everything, at random


@given(
    m=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    r=st.integers(1, 20),
    bs=st.sampled_from((32, 64, 128, 256, 512, 1024, 2048, 4096)),
    base=st.sampled_from(("dense", "nf4", "nested")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(testing.LAYOUTS),
    adapter=st.sampled_from(("fp32", "same", "mixed")),
)
def test_any_shape(backend: str, **case: Any) -> None:
    c = LoraCase(case | {"bias": "none"})
    truth, magnitude = c.products(lambda t: t), c.products(torch.abs)
    y, h = ops.lora_linear(*c.forward_args)
    dx, da, db = ops.lora_linear_backward(*c.backward_args(truth["h"].float()))
    got = {"y": y, "h": h, "dx": dx, "da": da, "db": db}
    depth = max(case["m"], case["n"], case["k"]) + case["r"]
    for name, value in got.items():
        assert_within_rounding(value, truth[name], magnitude[name], depth, name)
    if case["base"] != "dense":
        y = ops.nf4_linear(c.x, *c.group, case["n"], None)
        dx = ops.nf4_linear_dx(c.dy, *c.group, case["k"])
        assert_within_rounding(y, c.x.double() @ c.w.t(), c.x.double().abs() @ c.w.abs().t(), depth, "base y")
        assert_within_rounding(dx, c.dy.double() @ c.w, c.dy.double().abs() @ c.w.abs(), depth, "base dx")


# Determinism, and what must not leak


def everything(c: LoraCase, n: int, k: int) -> list[Tensor]:
    y, h = ops.lora_linear(*c.forward_args)
    results = [y, h, *ops.lora_linear_backward(*c.backward_args(h))]
    if c.group[1] is not None:
        results += [ops.nf4_linear(c.x, *c.group, n, c.bias), ops.nf4_linear_dx(c.dy, *c.group, k)]
    return results


def big_case(base: str, dtype: torch.dtype, m: int = 70) -> LoraCase:
    return LoraCase(lora_case(m, 200, 576, base, dtype) | {"bias": "fp32"})


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype, base: str) -> None:
    """Also after the kernels' scratch memory has held NaN: nothing of an earlier call may be read."""
    c = big_case(base, dtype)
    inputs = [t for t in (*c.forward_args, c.dy) if isinstance(t, Tensor)]
    before = [t.clone() for t in inputs]
    first = everything(c, 200, 576)
    poisoned = big_case(base, dtype, m=200)
    for t in (poisoned.x, poisoned.dy, poisoned.a, poisoned.b):
        t.fill_(float("nan"))
    everything(poisoned, 200, 576)
    for got, want in zip(everything(c, 200, 576), first, strict=True):
        assert got.isfinite().all() and torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"


THREADED = {"m1": (1, 200, 576), "m3": (3, 200, 576), "m70": (70, 200, 576), "m70-narrow": (70, 2048, 64)}


@pytest.mark.parametrize("shape", THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_threads_do_not_change_a_bit(backend: str, dtype: torch.dtype, shape: str) -> None:
    """However the work is cut: by columns, or by rows where there are few columns."""
    if backend in ("reference", "simt", "triton"):
        pytest.skip(f"{backend}: torch's own matmul may split sums by threads")
    m, n, k = THREADED[shape]
    c = LoraCase(lora_case(m, n, k, "nested", dtype))
    same_with_any_threads(lambda: everything(c, n, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_bad_row_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    """An Inf or NaN in one row of x must not reach another row through a tail that was read too far."""
    weight = testing.nf4_weight(33, 71)
    x = testing.tensor(9, 71, dtype=dtype)
    clean = ops.nf4_linear(x, *weight._state.op_args, 33, None)
    dy = testing.tensor(9, 33, dtype=dtype)
    clean_dx = ops.nf4_linear_dx(dy, *weight._state.op_args, 71)
    for row in (0, 4, 8):
        bad_x, bad_dy = x.clone(), dy.clone()
        bad_x[row], bad_dy[row] = float("inf"), float("nan")
        others = [i for i in range(9) if i != row]
        y = ops.nf4_linear(bad_x, *weight._state.op_args, 33, None)
        dx = ops.nf4_linear_dx(bad_dy, *weight._state.op_args, 71)
        assert not y[row].isfinite().any() and not dx[row].isfinite().any()
        if backend == "reference":  # torch's matmul may round differently, but not leak
            assert y[others].isfinite().all() and dx[others].isfinite().all()
        else:
            assert torch.equal(y[others], clean[others]) and torch.equal(dx[others], clean_dx[others])
