"""column_sums, the gradient of biases, on every back end."""

from __future__ import annotations

import pytest
import torch
from numbers_policy import Result, each_dtype, same_with_any_threads
from skips import require

import peft_kernels as pk
import testing

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")


@each_dtype
@pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 200])
def test_column_sums(backend: str, n: int, dtype: torch.dtype) -> None:
    for m in (0, 1, 2, 31, 63, 64, 65, 130, 515):
        x = testing.tensor(m, n, dtype=dtype)
        wide = x.double()
        got = ops.column_sums(x)
        assert got.shape == (n,) and got.dtype == torch.float32
        plain = testing.reference_op("column_sums")(x)
        Result(got, plain, wide.sum(0), wide.abs().sum(0)).check(m, f"{m} rows")


def test_any_shape_and_order_in_memory(backend: str) -> None:
    x = testing.tensor(12, 35)
    want = ops.column_sums(x)
    every_second = torch.stack((x, x + 1), 1).flatten(0, 1)[::2]
    for same in (x.view(2, 3, 2, 35), x.t().contiguous().t(), every_second):
        got = ops.column_sums(same)
        if backend.startswith("cpu"):
            assert torch.equal(got, want)
        else:  # torch may sum in another order
            assert testing.relative_error(got, want) < 1e-6
    assert torch.equal(ops.column_sums(x[3]), x[3])
    assert torch.equal(ops.column_sums(x[3].expand(2, 35)), 2 * x[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_in_their_column(backend: str, value: float) -> None:
    x = testing.tensor(70, 35)
    want = ops.column_sums(x)
    x[66, 33] = value
    got = ops.column_sums(x)
    others = torch.arange(35) != 33
    assert torch.equal(got[others], want[others])
    assert str(got[33].item()) == str(value)


@each_dtype
def test_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: torch's own functions may split their work by threads")
    x = testing.tensor(2000, 300, dtype=dtype)
    same_with_any_threads(lambda: [ops.column_sums(x)])


@each_dtype
@pytest.mark.parametrize("kind", ["nf4_linear", "lora_linear"])
def test_bias_gradients(backend: str, kind: str, dtype: torch.dtype) -> None:
    """The gradient of a 16-bit bias is rounded once, for any number of rows."""
    x, weight = testing.tensor(300, 64, dtype=dtype), testing.nf4_weight(33, 64)
    dy = testing.tensor(300, 33, dtype=dtype, seed=1)
    for of_bias in (dtype, torch.float32):
        bias = torch.zeros(33, dtype=of_bias, requires_grad=True)
        if kind == "nf4_linear":
            y = pk.nf4_linear(x, weight, bias)
        else:
            y = pk.lora_linear(x, weight, testing.tensor(4, 64), testing.tensor(33, 4), 1.0, bias)
        (got,) = torch.autograd.grad(y, bias, dy)
        want = dy.sum(0) if dtype == torch.float32 else ops.column_sums(dy)
        assert got.dtype == of_bias and torch.equal(got, want.to(of_bias))


def test_the_cpu_has_a_kernel() -> None:
    """torch's sum would first copy 16-bit rows to fp32."""
    require("cpu")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("peft_kernels_cpu::column_sums", "CPU")


def test_refused() -> None:
    require("cpu")
    with pytest.raises(RuntimeError, match="x: expected at least 1 dimension, got 0"):
        torch.ops.peft_kernels_cpu.column_sums(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="x: expected float32, bfloat16 or float16, got Double"):
        torch.ops.peft_kernels_cpu.column_sums(torch.ones(2, 3).double())
