"""Inputs of the experts' ops, the truth in fp64 by separate formulas, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lora_cases import UNSCALED
from numbers_policy import Result, check, dense64, once
from torch import Tensor

import testing
from peft_kernels import NF4Weight
from peft_kernels.core import dispatch

ops = torch.ops.peft_kernels

SCALING = 1.7

SPLITS: dict[str, tuple[int, ...]] = {
    "even": (5, 5, 5, 5, 0),
    "gaps": (0, 7, 0, 10, 3),
    "one-of-all": (0, 0, 20, 0, 0),
    "decode": (1, 1, 1, 1, 1, 1, 1, 1, 0),
    "uneven": (70, 1, 0, 9, 2),
    "all-behind": (0, 0, 0, 6),
    "no-rows": (0, 0, 0),
    "one-expert": (13, 2),
}
"""Rows of each expert, and last the number of rows after those."""
MANY = (*(i % 19 for i in range(40)), 1100, 1, 0, 7)
"""More rows than are packed at once; one expert alone has more, the others are small."""
LONG = (300, 0, 9, 8, 0)
"""An expert with more rows than gradients of adapters sum at once, and an odd number of them."""


def ends_of(split: Sequence[int]) -> Tensor:
    return torch.tensor(split[:-1]).cumsum(0).to(torch.int32)


def runs(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, slice of its rows) of each expert that has rows."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if end > begin:
            yield e, slice(begin, end)
        begin = end


def experts_weight(
    experts: int, n: int, k: int, bs: int, nested: bool, seed: int = 1, form: str = "nf4"
) -> NF4Weight:
    dense = testing.tensor(experts, n, k, seed=seed, scale=max(k, 1) ** -0.5)
    if form != "nf4":  # also with different scales of whole experts
        dense = testing.uneven(dense) * (1 + torch.arange(experts)).view(-1, 1, 1)
    with dispatch.use_backend("reference"):
        return NF4Weight.quantize(dense, bs, nested, format=form)


def in_peft_layout(b: Tensor) -> Tensor:
    """(experts, out, r) in PEFT's layout of lora_B, (out, r * experts)."""
    return b.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def expanded(t: Tensor) -> Tensor:
    """The first expert's values for all, expanded with stride 0."""
    return t[:1].expand_as(t)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "peft": in_peft_layout,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": expanded,
}
"""Of adapters in memory."""


class ExpertsCase:
    """Inputs of one case, results of plain torch, and the truth."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        n, k, r, dtype, bias = (case[name] for name in ("n", "k", "r", "dtype", "bias"))
        split = SPLITS[case["split"]] if isinstance(case["split"], str) else case["split"]
        m, experts = sum(split), len(split) - 1
        self.ends, self.n, self.k = ends_of(split), n, k
        self.x = testing.activations(m, k, case["layout"], dtype, seed)
        self.dy = testing.activations(m, n, case["layout"], dtype, seed + 2)
        a_dtype = dtype if case["adapter"] == "same" else torch.float32
        b_dtype = torch.float32 if case["adapter"] == "fp32" else dtype
        strided = STRIDES[case["strides"]]
        self.a = strided(testing.tensor(experts, r, k, dtype=a_dtype, seed=seed + 3, scale=k**-0.5))
        self.b = strided(testing.tensor(experts, n, r, dtype=b_dtype, seed=seed + 4, scale=r**-0.5))
        of_a, of_b, of_scaling = case.get("large", UNSCALED)
        self.a, self.b, self.scaling = self.a * of_a, self.b * of_b, SCALING * of_scaling
        self.bias = None
        if bias != "none":
            bias_dtype = torch.float32 if bias == "fp32" else dtype
            self.bias = testing.tensor(experts, n, dtype=bias_dtype, seed=seed + 5, scale=0.1)
        if case["base"] == "dense":
            dense = testing.tensor(experts, n, k, dtype=dtype, seed=seed + 1, scale=k**-0.5)
            self.group: tuple[Any, ...] = (dense, None, None, None, 0)
            self.w = dense.double()
        else:
            form = case["bs"], case["base"] == "nested", seed + 1, case.get("format", "nf4")
            weight = experts_weight(experts, n, k, *form)
            self.group, self.w = weight._state.op_args, dense64(weight)
        self.linear_args = (self.x, self.ends, *self.group, n, self.bias)
        self.dx_args = (self.dy, self.ends, *self.group, k)
        self.forward_args = (self.x, self.ends, *self.group, self.bias, self.a, self.b, self.scaling)
        self.truth, self.magnitude = self.results(lambda t: t), self.results(torch.abs)

    def backward_args(self, h: Tensor, needs: str = "xab") -> tuple[Any, ...]:
        flags = tuple(name in needs for name in "xab")
        return (self.dy, self.x, h, self.ends, *self.group, self.a, self.b, self.scaling, *flags)

    def results(self, widen: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """All results; with `widen` the absolute value, the sums of absolute terms."""
        x, dy, a, b, w = (widen(t.double()) for t in (self.x, self.dy, self.a, self.b, self.w))
        zeros: Callable[..., Tensor] = x.new_zeros
        out = {
            "linear": zeros(x.shape[0], self.n), "linear_dx": zeros(x.shape),
            "y": zeros(x.shape[0], self.n), "h": zeros(x.shape[0], a.shape[1]),
            "dx": zeros(x.shape), "da": zeros(a.shape), "db": zeros(b.shape),
        }  # fmt: skip
        for e, rows in runs(self.ends):
            bias = 0.0 if self.bias is None else widen(self.bias[e].double())
            h, dh = x[rows] @ a[e].t(), self.scaling * dy[rows] @ b[e]
            out["linear"][rows] = x[rows] @ w[e].t() + bias
            out["linear_dx"][rows] = dy[rows] @ w[e]
            out["y"][rows] = out["linear"][rows] + self.scaling * h @ b[e].t()
            out["h"][rows] = h
            out["dx"][rows] = out["linear_dx"][rows] + dh @ a[e]
            out["da"][e] = dh.t() @ x[rows]
            out["db"][e] = self.scaling * dy[rows].t() @ h
        return out

    def result(self, name: str, got: Tensor, plain: Tensor) -> Result:
        return Result(got, plain, self.truth[name], self.magnitude[name])


experts_case = once(ExpertsCase)


def sized(case: dict[str, Any]) -> dict[str, Any]:
    """Number of rows of the case."""
    return case | {"m": sum(SPLITS[case["split"]])}


def check_experts_linear(case: dict[str, Any]) -> None:
    c = experts_case(sized(case))
    plain = testing.reference_op("experts_linear")(*c.linear_args)
    check({"linear": c.result("linear", ops.experts_linear(*c.linear_args), plain)}, case["k"])


def check_experts_linear_dx(case: dict[str, Any]) -> None:
    c = experts_case(sized(case))
    plain = testing.reference_op("experts_linear_dx")(*c.dx_args)
    check({"linear_dx": c.result("linear_dx", ops.experts_linear_dx(*c.dx_args), plain)}, case["n"])


def check_experts_lora_linear(case: dict[str, Any]) -> None:
    c = experts_case(sized(case))
    plain = testing.reference_op("experts_lora_linear")(*c.forward_args)
    got = zip(("y", "h"), ops.experts_lora_linear(*c.forward_args), plain, strict=True)
    results = {name: c.result(name, g, p) for name, g, p in got}
    check(results, case["k"] + case["r"])


def check_experts_lora_linear_backward(case: dict[str, Any]) -> None:
    c = experts_case(sized(case))
    h = c.truth["h"].float()
    dy, x, *rest = c.backward_args(h)
    if case["layout"] == "expanded":  # torch's sums of these cannot be matched
        dy, x = dy.contiguous(), x.contiguous()
    plain = testing.reference_op("experts_lora_linear_backward")(dy, x, *rest)
    got = ops.experts_lora_linear_backward(*c.backward_args(h, case["needs"]))
    results = {}
    for need, like, name, g, p in zip("xab", (c.x, c.a, c.b), ("dx", "da", "db"), got, plain, strict=True):
        assert g.dtype == like.dtype, name
        assert g.shape == (like.shape if need in case["needs"] else (0,)), name
        assert g.is_contiguous(), name
        if need in case["needs"]:
            results[name] = c.result(name, g, p)
    check(results, max(sum(SPLITS[case["split"]]), case["n"], case["k"]) + case["r"])
