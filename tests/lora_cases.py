"""Inputs of nf4_linear and lora_linear, their truth in fp64 by formulas that are written here, and the checks
against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numbers_policy import Result, bias_of, check, dense64
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
ROWS = (0, 1, 2, 5, 17, 64, 130)


def weight_of(case: dict[str, Any], seed: int) -> Any:
    return testing.nf4_weight(case["n"], case["k"], case["bs"], case["nested"], seed=seed + 1)


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
