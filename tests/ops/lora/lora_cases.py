"""Inputs of nf4_linear and lora_linear, the truth in fp64 by separate formulas, and the comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numbers_policy import Result, assert_in_range, bias_of, check, dense64, once, short
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
ROWS = (0, 1, 2, 5, 17, 64, 130)


class LinearCase:
    """The inputs of nf4_linear and nf4_linear_dx, the results of plain torch, and the truth in fp64."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        m, n, k, dtype = (case[name] for name in ("m", "n", "k", "dtype"))
        form = case.get("format", "nf4")
        weight = testing.nf4_weight(n, k, case["bs"], case["nested"], seed=seed + 1, format=form)
        bias = bias_of(case, case["bias"], n)
        x, dy = (testing.activations(m, size, case["layout"], dtype, seed) for size in (k, n))
        self.args = (x, *weight._state.op_args, n, bias)
        self.dx_args = (dy, *weight._state.op_args, k)
        w, b = dense64(weight), torch.zeros(n).double() if bias is None else bias.double()
        self.y = (
            testing.reference_op("nf4_linear")(*self.args),
            x.double() @ w.t() + b,
            x.double().abs() @ w.abs().t() + b.abs(),
        )
        self.dx = (
            testing.reference_op("nf4_linear_dx")(*self.dx_args),
            dy.double() @ w,
            dy.double().abs() @ w.abs(),
        )


linear_case = once(LinearCase)


def check_nf4_linear(case: dict[str, Any]) -> None:
    c = linear_case(case)
    check({"y": Result(ops.nf4_linear(*c.args), *c.y)}, case["k"])


def check_nf4_linear_dx(case: dict[str, Any]) -> None:
    c = linear_case(case)
    check({"dx": Result(ops.nf4_linear_dx(*c.dx_args), *c.dx)}, case["n"])


SCALING = 1.7
UNSCALED = (1.0, 1.0, 1.0)
BEYOND_FP16 = {
    "h": {"adapter": "fp32", "large": (2.0**20, 2.0**-20, 1.0)},
    "dh": {"adapter": "fp32", "large": (2.0**-20, 2.0**20, 1.0)},
    "scaling": {"adapter": "fp32", "large": (1.0, 2.0**-20, 2.0**20)},
    "fp16-h": {"adapter": "same", "large": (2.0**16, 2.0**-8, 2.0**-8)},
    "fp16-dh": {"adapter": "same", "large": (2.0**-8, 2.0**13, 1.0)},
    "fp16-scaling": {"adapter": "same", "large": (2.0**3, 2.0**-13, 2.0**13)},
}
"""Factors of A, B and the scaling with which h, dh = scaling dy B, or scaling h is above 65,504, the largest
number of fp16, but y and dx are not."""
# Sums differ in these; fp16 is summed like bf16.
SUMS = ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "same"))
each_sum = pytest.mark.parametrize("dtype,adapter", SUMS, ids=["-".join(map(short, one)) for one in SUMS])


def lora_case(m: int, n: int, k: int, base: str, dtype: torch.dtype) -> dict[str, Any]:
    sizes = {"m": m, "n": n, "k": k, "r": 8, "bs": 64}
    return sizes | {"base": base, "dtype": dtype, "adapter": "fp32", "bias": "none", "layout": "contiguous"}


class LoraCase:
    """The inputs of one case, and the truth in fp64 by separate formulas."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        m, n, k, r, dtype = (case[name] for name in ("m", "n", "k", "r", "dtype"))
        a_dtype = dtype if case["adapter"] == "same" else torch.float32
        b_dtype = torch.float32 if case["adapter"] == "fp32" else dtype
        self.x = testing.activations(m, k, case["layout"], dtype, seed)
        self.dy = testing.activations(m, n, case["layout"], dtype, seed + 2)
        self.a = testing.tensor(r, k, dtype=a_dtype, seed=seed + 3, scale=k**-0.5)
        self.b = testing.tensor(n, r, dtype=b_dtype, seed=seed + 4, scale=r**-0.5)
        of_a, of_b, of_scaling = case.get("large", UNSCALED)
        self.a, self.b, self.scaling = self.a * of_a, self.b * of_b, SCALING * of_scaling
        self.bias = bias_of(case, case["bias"], n)
        if case["base"] == "dense":
            dense = testing.tensor(n, k, dtype=dtype, seed=seed + 1, scale=k**-0.5)
            self.group: tuple[Any, ...] = (dense, None, None, None, 0)
            self.w = dense.double()
        else:
            form, nested = case.get("format", "nf4"), case["base"] == "nested"
            weight = testing.nf4_weight(n, k, case["bs"], nested, seed=seed + 1, format=form)
            self.group, self.w = weight._state.op_args, dense64(weight)
        self.forward_args = (self.x, *self.group, self.bias, self.a, self.b, self.scaling, 0.0, None, None)

    def backward_args(self, h: Tensor, needs: str = "xab") -> tuple[Any, ...]:
        flags = tuple(name in needs for name in "xab")
        return (self.dy, self.x, h, *self.group, self.a, self.b, self.scaling, 0.0, None, None, *flags)

    def gemm_results(self, widen: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """y, h, dx, da, db; with `widen` the absolute value, the sums of absolute terms."""
        x, dy, a, b, w = (widen(t.double()) for t in (self.x, self.dy, self.a, self.b, self.w))
        x2, dy2 = x.flatten(0, -2), dy.flatten(0, -2)
        h, dh = x @ a.t(), self.scaling * dy @ b
        y = x @ w.t() + self.scaling * h @ b.t()
        return {
            "y": y if self.bias is None else y + widen(self.bias.double()),
            "h": h,
            "dx": dy @ w + dh @ a,
            "da": dh.flatten(0, -2).t() @ x2,
            "db": self.scaling * dy2.t() @ h.flatten(0, -2),
        }

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        return self.gemm_results(lambda t: t)

    @functools.cached_property
    def magnitude(self) -> dict[str, Tensor]:
        return self.gemm_results(torch.abs)

    @functools.cached_property
    def plain_outputs(self) -> tuple[Tensor, ...]:
        return testing.reference_op("lora_linear")(*self.forward_args)

    @functools.cached_property
    def plain_gradients(self) -> tuple[Tensor, ...]:
        dy, x, *rest = self.backward_args(self.truth["h"].float())
        # Contiguous tensors: torch's sums of rows expanded from one cannot be matched.
        return testing.reference_op("lora_linear_backward")(dy.contiguous(), x.contiguous(), *rest)


lora_linear_case = once(LoraCase)


def check_lora_linear(case: dict[str, Any]) -> None:
    c = lora_linear_case(case)
    got = zip(("y", "h"), ops.lora_linear(*c.forward_args), c.plain_outputs, strict=True)
    results = {name: Result(g, p, c.truth[name], c.magnitude[name]) for name, g, p in got}
    check(results, case["k"] + case["r"])


def check_lora_linear_backward(case: dict[str, Any]) -> None:
    c = lora_linear_case(case)
    got = ops.lora_linear_backward(*c.backward_args(c.truth["h"].float(), case["needs"]))
    results = {}
    for need, name, like, g, p in zip(
        "xab", ("dx", "da", "db"), (c.x, c.a, c.b), got, c.plain_gradients, strict=True
    ):
        assert g.dtype == like.dtype, name
        assert g.shape == (like.shape if need in case["needs"] else (0,)), name
        if need in case["needs"]:
            results[name] = Result(g, p, c.truth[name], c.magnitude[name])
    check(results, max(case["m"], case["n"], case["k"]) + case["r"])


def check_ranks_beyond_fp16(m: int, large: str) -> None:
    c = LoraCase(lora_case(m, 128, 192, "nested", torch.float16) | BEYOND_FP16[large])
    y, h = ops.lora_linear(*c.forward_args)
    dx, da, db = ops.lora_linear_backward(*c.backward_args(h))
    assert_in_range({"y": y, "dx": dx, "da": da, "db": db}, c, 192 + 8)
