"""Inputs of multi_lora_linear and of lora_linear with dropout, and the truth in fp64 by separate formulas,
with masks from an independent Philox."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import philox
import torch
from lora_cases import UNSCALED
from numbers_policy import Result, bias_of, check, dense64, once
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
SCALING = (1.7, -0.6, 0.25, 3.0, 1.0)
SEED = -987654321012345


def multi_case(**changes: Any) -> dict[str, Any]:
    """A typical case, with changes."""
    return {
        "m": 17, "k": 96, "n": 100, "r": 8, "layers": 2, "adapters": "010", "base": "nested", "bs": 64,
        "dtype": torch.float32, "adapter": "fp32", "bias": "same", "layout": "contiguous", "p": 0.5,
        "groups": "runs", "needs": "xab",
    } | changes  # fmt: skip


def groups_of(kind: str, m: int, count: int) -> tuple[list[int], Tensor | None]:
    """The group of each adapter, and of each row."""
    row, group = torch.arange(m), [i % 3 for i in range(count)]
    if kind == "none":
        return group, None
    if kind == "one":
        return [7] * count, torch.full((m,), 7)
    if kind == "runs":  # 0 0 .. 1 1 .. 2 2 .. 0 0 ..
        return group, row // (m // 5 + 1) % 3
    if kind == "alternating":
        return group, (row % 3).repeat_interleave(2)[::2]
    if kind == "nobody":
        return group, row % 4 - 1
    assert kind == "absent", kind
    # 2^32 would be group 0 in 32 bits; 5 occurs in no row.
    return [(2**32, 5, 1)[g] for g in group], row % 2


@functools.lru_cache(maxsize=1000)
def nf4_weight(n: int, k: int, blocksize: int, nested: bool, seed: int, form: str, session: int) -> Any:
    """`session`: testing.SEED, on which the values depend too."""
    return testing.nf4_weight(n, k, blocksize, nested, seed=seed, format=form)


class MultiCase:
    """The inputs of one case, and the truth in fp64 by separate formulas."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        self.case, dtype, m, k = case, case["dtype"], case["m"], case["k"]
        self.n = [case["n"], 33, 100, 32, 7, 64][: case["layers"]]
        self.layer = [int(c) % case["layers"] for c in case["adapters"]]
        count = len(self.layer)
        ranks = [case["r"] if i == count // 2 else r for i, r in enumerate((5, 16, 1, 3, 2)[:count])]
        self.x = testing.activations(m, k, case["layout"], dtype, seed)
        self.dy = [
            testing.activations(m, n, case["layout"], dtype, seed + 20 + j) for j, n in enumerate(self.n)
        ]
        a_dtype = dtype if case["adapter"] == "same" else torch.float32
        b_dtype = torch.float32 if case["adapter"] == "fp32" else dtype
        self.a = [
            testing.tensor(r, k, dtype=a_dtype, seed=seed + 3 + i, scale=k**-0.5) for i, r in enumerate(ranks)
        ]
        self.b = [
            testing.tensor(self.n[j], r, dtype=b_dtype, seed=seed + 9 + i, scale=r**-0.5)
            for i, (r, j) in enumerate(zip(ranks, self.layer, strict=True))
        ]
        of_a, of_b, of_scaling = case.get("large", UNSCALED)
        self.a, self.b = ([t * factor for t in one] for one, factor in ((self.a, of_a), (self.b, of_b)))
        self.scaling = [s * of_scaling for s in SCALING[:count]]
        various = ("fp32", "none", "same")
        kinds = [various[j % 3] if case["bias"] == "various" else case["bias"] for j in range(len(self.n))]
        biases = [bias_of(case, kind, n) for kind, n in zip(kinds, self.n, strict=True)]
        self.bias = [torch.empty(0) if bias is None else bias for bias in biases]
        bases = [self._base(j, n, seed) for j, n in enumerate(self.n)]
        self.w = [w for _, w in bases]
        weight, absmax, absmax2, offset, layout = ([b[i] for b, _ in bases] for i in range(5))
        self.weights = (weight, absmax, absmax2, offset, layout)
        self.p = [(0.5, 0.0, 0.1, 1.0, 0.3)[i] if case["p"] == "various" else case["p"] for i in range(count)]
        self.seed = None if case["p"] == 0 else torch.tensor(SEED + seed)
        self.group, self.row_group = groups_of(case["groups"], m, count)
        self.serving = (self.layer, self.scaling, self.p, self.seed, self.group, self.row_group)
        self.serving += (case.get("compute"),)
        self.forward_args = (self.x, *self.weights, self.n, self.bias, self.a, self.b, *self.serving)
        self.mask = [philox.factors((m, k), p, SEED + seed, i) for i, p in enumerate(self.p)]

    def _base(self, j: int, n: int, seed: int) -> tuple[tuple[Any, ...], Tensor]:
        case, k = self.case, self.case["k"]
        kind = ("nested", "dense", "nf4")[j] if case["base"] == "various" else case["base"]
        if kind == "dense":
            dense = testing.tensor(
                n, k, dtype=case.get("compute") or case["dtype"], seed=seed + 1 + j, scale=k**-0.5
            )
            return (dense, None, None, None, 0), dense.double()
        form = case.get("format", "nf4")
        weight = nf4_weight(n, k, case["bs"], kind == "nested", seed + 1 + j, form, testing.SEED)
        return weight._state.op_args, dense64(weight)

    def served(self, i: int) -> Tensor:
        """(rows, 1): 1 where adapter i serves the row."""
        if self.row_group is None:
            return torch.ones(self.case["m"], 1).double()
        return (self.row_group == self.group[i]).double()[:, None]

    def flags(self, needs: str) -> tuple[bool, list[bool], list[bool]]:
        count = len(self.layer)
        if needs == "some":
            return False, [i % 2 == 0 for i in range(count)], [i % 2 == 1 for i in range(count)]
        return "x" in needs, ["a" in needs] * count, ["b" in needs] * count

    def backward_args(self, h: Tensor, needs: str = "xab") -> tuple[Any, ...]:
        return (self.dy, self.x, h, *self.weights, self.a, self.b, *self.serving, *self.flags(needs))

    def gemm_results(self, widen: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """y0.., h, dx, da0.., db0.., of x's leading sizes; `widen` abs: the sums of absolute terms."""

        def wide(tensors: list[Tensor]) -> list[Tensor]:
            return [widen(t.double()) for t in tensors]

        m, k = self.case["m"], self.case["k"]
        x, dy = widen(self.x.double()).reshape(m, k), [d.reshape(m, d.shape[-1]) for d in wide(self.dy)]
        a, b, w, bias = wide(self.a), wide(self.b), wide(self.w), wide(self.bias)
        scaling = [widen(torch.tensor(s).double()) for s in self.scaling]
        y = [x @ w[j].t() + (bias[j] if bias[j].numel() else 0) for j in range(len(w))]
        dx, h, da, db = sum(d @ w[j] for j, d in enumerate(dy)), [], [], []
        for i, j in enumerate(self.layer):
            dropped, served = x * self.mask[i], self.served(i)
            h.append(served * (dropped @ a[i].t()))
            y[j] = y[j] + scaling[i] * h[i] @ b[i].t()
            dh = served * scaling[i] * (dy[j] @ b[i])
            dx = dx + self.mask[i] * (dh @ a[i])
            da.append(dh.t() @ dropped)
            db.append(scaling[i] * dy[j].t() @ h[i])
        lead = self.x.shape[:-1]
        columns = torch.cat(h, 1) if h else torch.zeros(m, 0).double()
        named = {f"y{j}": t for j, t in enumerate(y)} | {"h": columns, "dx": dx}
        named = {name: t.view(*lead, t.shape[1]) for name, t in named.items()}
        return named | {f"da{i}": t for i, t in enumerate(da)} | {f"db{i}": t for i, t in enumerate(db)}

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        return self.gemm_results(lambda t: t)

    @functools.cached_property
    def magnitude(self) -> dict[str, Tensor]:
        return self.gemm_results(torch.abs)

    @functools.cached_property
    def plain_outputs(self) -> dict[str, Tensor]:
        return named_outputs(*testing.reference_op("multi_lora_linear")(*self.forward_args))

    @functools.cached_property
    def plain_gradients(self) -> dict[str, Tensor]:
        """The gradients that the case needs."""
        needs = self.case["needs"]
        args = self.backward_args(self.truth["h"].float(), needs)
        return named_gradients(self, needs, *testing.reference_op("multi_lora_linear_backward")(*args))

    @property
    def depth(self) -> int:
        return max(self.case["m"], self.case["k"], sum(self.n)) + sum(a.shape[0] for a in self.a)


def named_outputs(y: Any, h: Tensor) -> dict[str, Tensor]:
    return {f"y{j}": t for j, t in enumerate(y)} | {"h": h}


def named_gradients(c: MultiCase, needs: str, dx: Tensor, da: Any, db: Any) -> dict[str, Tensor]:
    """The needed gradients; the others must have no elements."""
    need_dx, need_da, need_db = c.flags(needs)
    assert len(da) == len(db) == len(c.layer)
    found = [("dx", dx, c.x, need_dx)]
    found += [(f"da{i}", g, c.a[i], need_da[i]) for i, g in enumerate(da)]
    found += [(f"db{i}", g, c.b[i], need_db[i]) for i, g in enumerate(db)]
    for name, g, like, need in found:
        assert g.dtype == like.dtype and g.shape == (like.shape if need else (0,)), name
        assert g.is_contiguous(), name
    return {name: g for name, g, _, need in found if need}


multi_lora_case = once(MultiCase)


def results(c: MultiCase, got: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Result]:
    return {n: Result(value, plain[n], c.truth[n], c.magnitude[n]) for n, value in got.items()}


def check_forward(case: dict[str, Any]) -> None:
    c = multi_lora_case(case)
    got = named_outputs(*ops.multi_lora_linear(*c.forward_args))
    check(results(c, got, c.plain_outputs), c.depth)


def check_backward(case: dict[str, Any]) -> None:
    c, needs = multi_lora_case(case), case["needs"]
    args = c.backward_args(c.truth["h"].float(), needs)
    got = named_gradients(c, needs, *ops.multi_lora_linear_backward(*args))
    check(results(c, got, c.plain_gradients), c.depth)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype and torch.equal(value, want[name]), name
