"""lora_linear and its backward op by the numbers policy on every back end, and the base alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import (
    BEYOND_FP16,
    ROWS,
    LoraCase,
    check_lora_linear,
    check_lora_linear_backward,
    check_nf4_linear,
    check_nf4_linear_dx,
    check_ranks_beyond_fp16,
    each_sum,
    lora_case,
)
from numbers_policy import DTYPES, FEATURES, assert_within_rounding, case_id, same_with_any_threads, short
from torch import Tensor

import testing
from peft_kernels import NF4Weight

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")


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


@each_lora_case
def test_lora_linear(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear(case)


@each_lora_case
def test_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear_backward(case)


@pytest.mark.parametrize("large", BEYOND_FP16)
@pytest.mark.parametrize("m", [5, 130])
def test_ranks_beyond_fp16(backend: str, m: int, large: str) -> None:
    check_ranks_beyond_fp16(m, large)


LONG = {"m17-n4096-k64": (17, 4096, 64), "m17-n64-k4096": (17, 64, 4096), "m3000-n32-k48": (3000, 32, 48)}


@pytest.mark.parametrize("shape", LONG)
@each_sum
def test_long_sums(backend: str, dtype: torch.dtype, adapter: str, shape: str) -> None:
    """Over thousands of terms one fp32 chain drifts, while plain torch's blocked sums do not."""
    m, n, k = LONG[shape]
    case = lora_case(m, n, k, "nested", dtype) | {"nested": True, "needs": "xab", "adapter": adapter}
    if adapter == "fp32":
        check_nf4_linear(case)
        check_nf4_linear_dx(case)
    check_lora_linear(case)
    check_lora_linear_backward(case)


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
    truth, magnitude = c.gemm_results(lambda t: t), c.gemm_results(torch.abs)
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


def everything(c: LoraCase, n: int, k: int) -> list[Tensor]:
    y, h = ops.lora_linear(*c.forward_args)
    results = [y, h, *ops.lora_linear_backward(*c.backward_args(h))]
    if c.group[1] is not None:
        results += [ops.nf4_linear(c.x, *c.group, n, c.bias), ops.nf4_linear_dx(c.dy, *c.group, k)]
    return results


def big_case(base: str, dtype: torch.dtype, adapter: str, m: int = 70) -> LoraCase:
    """Several tiles in each direction, the last ones partial."""
    return LoraCase(lora_case(m, 136, 320, base, dtype) | {"bias": "fp32", "adapter": adapter})


@pytest.mark.parametrize("base", ["dense", "nested"])
@each_sum
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype, adapter: str, base: str) -> None:
    """Also after the scratch memory held NaN: nothing of an earlier call may be read."""
    c = big_case(base, dtype, adapter)
    inputs = [t for t in (*c.forward_args, c.dy) if isinstance(t, Tensor)]
    before = [t.clone() for t in inputs]
    first = everything(c, 136, 320)
    poisoned = big_case(base, dtype, adapter, m=80)
    for t in (poisoned.x, poisoned.dy, poisoned.a, poisoned.b):
        t.fill_(float("nan"))
    everything(poisoned, 136, 320)
    for got, want in zip(everything(c, 136, 320), first, strict=True):
        assert got.isfinite().all() and torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"


THREADED = {
    "m1": (1, 200, 576),
    "m3": (3, 200, 576),
    "m70": (70, 200, 576),
    "m70-narrow": (70, 2048, 64),
    "m600": (600, 96, 64),  # more rows than dA and dB sum in one pass
}


@pytest.mark.parametrize("shape", THREADED)
@each_sum
def test_threads_do_not_change_a_bit(backend: str, dtype: torch.dtype, adapter: str, shape: str) -> None:
    """Work is divided by columns, or by rows where there are few columns."""
    if backend in ("reference", "ptx", "triton"):
        pytest.skip(f"{backend}: torch's own matmul may split sums by threads")
    m, n, k = THREADED[shape]
    c = LoraCase(lora_case(m, n, k, "nested", dtype) | {"adapter": adapter})
    same_with_any_threads(lambda: everything(c, n, k))


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("unequal", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_an_fp32_adapter_keeps_its_bits(backend: str, dtype: torch.dtype, unequal: str, m: int) -> None:
    """Two ranks cancel except for 1/512, which rounding h or B (forward), or dh or A (backward), to 16 bits
    would lose."""
    n, k = 72, 128
    a, b = testing.tensor(1, k, seed=3, scale=k**-0.5), testing.tensor(n, 1, seed=4)
    near = 1 + 2**-9 + 2**-11
    lora_a = torch.cat((a, a * (near if unequal == "a" else 1)))
    lora_b = torch.cat((b, -b * (near if unequal == "b" else 1)), 1)
    base = NF4Weight.quantize(torch.zeros(n, k), double_quant=False)._state.op_args
    x, dy = testing.tensor(m, k, dtype=dtype), testing.tensor(m, n, dtype=dtype, seed=1)
    how = (0.5, 0.0, None, None)
    y, h = ops.lora_linear(x, *base, None, lora_a, lora_b, *how)
    dx, _, _ = ops.lora_linear_backward(dy, x, h, *base, lora_a, lora_b, *how, True, False, False)
    wide_a, wide_b = lora_a.double(), lora_b.double()
    assert testing.relative_error(y, 0.5 * x.double() @ wide_a.t() @ wide_b.t()) < 0.02
    assert testing.relative_error(dx, 0.5 * dy.double() @ wide_b @ wide_a) < 0.02
