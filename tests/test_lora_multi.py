"""multi_lora_linear and lora_linear with dropout, forward and backward, on every back end.

By the numbers policy against fp64 formulas that are written here, with masks from a Philox of the tests' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import philox
import pytest
import torch
from numbers_policy import (
    DTYPES,
    FEATURES,
    Result,
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
ROWS = (0, 1, 2, 5, 17, 130)
RANKS = (1, 3, 8, 16, 33, 70)
SCALING = (1.7, -0.6, 0.25, 3.0, 1.0)
SEED = -987654321012345


pytestmark = pytest.mark.usefixtures("nan_outputs")


def test_philox_of_the_tests() -> None:
    """The known answers of Random123."""
    answers = {
        (0, 0, 0, 0, 0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (2**32 - 1,) * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            "d16cfe09 94fdcceb 5001e420 24126ea1"
        ),
    }
    for (*counter, k0, k1), answer in answers.items():
        (got,) = philox.philox4x32(np.array([counter]), (k0, k1))
        assert " ".join(f"{int(word):08x}" for word in got) == answer


# Values

CASES = testing.pairwise(
    m=ROWS,
    k=FEATURES,
    n=FEATURES,
    r=RANKS,
    layers=(1, 2, 3),
    adapters=("0", "120", "00", "", "2", "02011"),
    base=("dense", "nf4", "nested", "various"),
    bs=(32, 64, 4096),
    dtype=DTYPES,
    adapter=("fp32", "same", "mixed"),
    bias=("none", "same", "fp32", "various"),
    layout=testing.LAYOUTS,
    p=(0.0, 0.1, 0.5, 1.0, "various"),
    groups=("none", "one", "runs", "alternating", "nobody", "absent"),
    needs=("xab", "x", "ab", "b", "some"),
)
each_case = pytest.mark.parametrize("case", CASES, ids=case_id)


def multi_case(**changes: Any) -> dict[str, Any]:
    """An ordinary case, with changes."""
    return {
        "m": 17, "k": 96, "n": 100, "r": 8, "layers": 2, "adapters": "010", "base": "nested", "bs": 64,
        "dtype": torch.float32, "adapter": "fp32", "bias": "same", "layout": "contiguous", "p": 0.5,
        "groups": "runs", "needs": "xab",
    } | changes  # fmt: skip


def groups_of(kind: str, m: int, count: int) -> tuple[list[int], Tensor | None]:
    """The group of each adapter, and those of the rows."""
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
def nf4_weight(n: int, k: int, blocksize: int, nested: bool, seed: int) -> Any:
    return testing.nf4_weight(n, k, blocksize, nested, seed=seed)


class MultiCase:
    """The inputs of one case, and the truth in fp64 by formulas of its own."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        self.case, dtype, m, k = case, case["dtype"], case["m"], case["k"]
        self.n = [case["n"], 33, 100][: case["layers"]]
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
        kinds = [("fp32", "none", "same")[j] if case["bias"] == "various" else case["bias"] for j in range(3)]
        biases = [bias_of(case, kind, n) for kind, n in zip(kinds, self.n, strict=False)]
        self.bias = [torch.empty(0) if bias is None else bias for bias in biases]
        bases = [self._base(j, n, seed) for j, n in enumerate(self.n)]
        self.w = [w for _, w in bases]
        weight, absmax, absmax2, offset, blocksize = ([b[i] for b, _ in bases] for i in range(5))
        self.weights = (weight, absmax, absmax2, offset, blocksize)
        self.p = [(0.5, 0.0, 0.1, 1.0, 0.3)[i] if case["p"] == "various" else case["p"] for i in range(count)]
        self.seed = None if case["p"] == 0 else torch.tensor(SEED + seed)
        self.group, self.row_group = groups_of(case["groups"], m, count)
        self.serving = (self.layer, list(SCALING[:count]), self.p, self.seed, self.group, self.row_group)
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
        weight = nf4_weight(n, k, case["bs"], kind == "nested", seed + 1 + j)
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

    def products(self, widen: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """y0.., h, dx, da0.., db0.., of x's leading sizes; `widen` abs: the sums of absolute terms."""

        def wide(tensors: list[Tensor]) -> list[Tensor]:
            return [widen(t.double()) for t in tensors]

        m, k = self.case["m"], self.case["k"]
        x, dy = widen(self.x.double()).reshape(m, k), [d.reshape(m, d.shape[-1]) for d in wide(self.dy)]
        a, b, w, bias = wide(self.a), wide(self.b), wide(self.w), wide(self.bias)
        scaling = [widen(torch.tensor(s).double()) for s in SCALING]
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

    @property
    def depth(self) -> int:
        return max(self.case["m"], self.case["k"], sum(self.n)) + sum(a.shape[0] for a in self.a)


def named_outputs(y: Any, h: Tensor) -> dict[str, Tensor]:
    return {f"y{j}": t for j, t in enumerate(y)} | {"h": h}


def named_gradients(c: MultiCase, needs: str, dx: Tensor, da: Any, db: Any) -> dict[str, Tensor]:
    """Those that are needed; the others must have no elements."""
    need_dx, need_da, need_db = c.flags(needs)
    assert len(da) == len(db) == len(c.layer)
    found = [("dx", dx, c.x, need_dx)]
    found += [(f"da{i}", g, c.a[i], need_da[i]) for i, g in enumerate(da)]
    found += [(f"db{i}", g, c.b[i], need_db[i]) for i, g in enumerate(db)]
    for name, g, like, need in found:
        assert g.dtype == like.dtype and g.shape == (like.shape if need else (0,)), name
        assert g.is_contiguous(), name
    return {name: g for name, g, _, need in found if need}


def results(c: MultiCase, got: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Result]:
    truth, magnitude = c.products(lambda t: t), c.products(torch.abs)
    return {name: Result(value, plain[name], truth[name], magnitude[name]) for name, value in got.items()}


def check_forward(case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        c = MultiCase(case, seed)
        got = named_outputs(*ops.multi_lora_linear(*c.forward_args))
        plain = named_outputs(*testing.reference_op("multi_lora_linear")(*c.forward_args))
        return results(c, got, plain)

    check(run, MultiCase(case).depth)


def check_backward(case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        c, needs = MultiCase(case, seed), case["needs"]
        args = c.backward_args(c.products(lambda t: t)["h"].float(), needs)
        got = named_gradients(c, needs, *ops.multi_lora_linear_backward(*args))
        plain = named_gradients(c, needs, *testing.reference_op("multi_lora_linear_backward")(*args))
        return results(c, got, plain)

    check(run, MultiCase(case).depth)


@each_case
def test_multi_lora_linear(backend: str, case: dict[str, Any]) -> None:
    check_forward(case)


@each_case
def test_multi_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    check_backward(case)


@pytest.mark.parametrize("groups", ["none", "runs", "alternating"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_many_rows(backend: str, dtype: torch.dtype, groups: str) -> None:
    """More rows than a kernel takes at a time, cut in the middle of a group."""
    case = multi_case(m=530, k=33, n=40, layers=1, adapters="000", bs=32, dtype=dtype, groups=groups)
    check_forward(case)
    check_backward(case)


# One adapter

# Few: the same bits as those of multi_lora_linear are asked for too.
SINGLE_CASES = testing.pairwise(
    m=(0, 1, 5, 17),
    k=(7, 96, 576),
    n=(1, 33, 100),
    r=(3, 16, 70),
    base=("dense", "nf4", "nested"),
    bs=(32, 64, 4096),
    dtype=DTYPES,
    adapter=("fp32", "same", "mixed"),
    bias=("none", "same", "fp32"),
    layout=("contiguous", "3-d", "column-step", "transposed"),
    p=(0.1, 0.5, 1.0),
    needs=("xab", "xa", "xb", "ab", "x", "a", "b"),
)
each_single_case = pytest.mark.parametrize("case", SINGLE_CASES, ids=case_id)


class SingleCase(MultiCase):
    """The same for lora_linear, as a case with one layer and one adapter."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        super().__init__(case | {"layers": 1, "adapters": "0", "groups": "none"}, seed)
        bias = self.bias[0] if self.bias[0].numel() else None
        weight = [values[0] for values in self.weights]
        self.adapter = (self.a[0], self.b[0], SCALING[0], self.p[0], self.seed, case.get("compute"))
        self.single_forward_args = (self.x, *weight, bias, *self.adapter)
        self.weight = weight

    def single_backward_args(self, h: Tensor, needs: str) -> tuple[Any, ...]:
        return (self.dy[0], self.x, h, *self.weight, *self.adapter, *(name in needs for name in "xab"))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype and torch.equal(value, want[name]), name


def outputs_of_one(y: Tensor, h: Tensor) -> dict[str, Tensor]:
    return named_outputs([y], h)


def gradients_of_one(c: MultiCase, needs: str, dx: Tensor, da: Tensor, db: Tensor) -> dict[str, Tensor]:
    return named_gradients(c, needs, dx, [da], [db])


@each_single_case
def test_lora_linear_with_dropout(backend: str, case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        c = SingleCase(case, seed)
        got = outputs_of_one(*ops.lora_linear(*c.single_forward_args))
        assert_same(got, named_outputs(*ops.multi_lora_linear(*c.forward_args)))
        plain = outputs_of_one(*testing.reference_op("lora_linear")(*c.single_forward_args))
        return results(c, got, plain)

    check(run, SingleCase(case).depth)


@each_single_case
def test_lora_linear_backward_with_dropout(backend: str, case: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, Result]:
        c, needs = SingleCase(case, seed), case["needs"]
        h = c.products(lambda t: t)["h"].float()
        args = c.single_backward_args(h, needs)
        got = gradients_of_one(c, needs, *ops.lora_linear_backward(*args))
        many = ops.multi_lora_linear_backward(*c.backward_args(h, needs))
        assert_same(got, named_gradients(c, needs, *many))
        plain = testing.reference_op("lora_linear_backward")(*args)
        return results(c, got, gradients_of_one(c, needs, *plain))

    check(run, SingleCase(case).depth)


# Masks


def mask_args(
    m: int, k: int, ps: list[float], seed: int, dtype: torch.dtype, row_group: Tensor | None = None
) -> tuple[Any, ...]:
    """x of ones, a base of zeros and identities for A: h shows every mask, exactly."""
    count, eye = len(ps), torch.eye(k)
    x, w = torch.ones(m, k, dtype=dtype), torch.zeros(1, k, dtype=dtype)
    a, b = [eye] * count, [torch.ones(1, k)] * count
    group = list(range(count)) if row_group is not None else [0] * count
    rest = ([0] * count, [1.0] * count, ps, torch.tensor(seed), group, row_group, None)
    return (x, [w], [None], [None], [None], [0], [1], [torch.empty(0)], a, b, *rest)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), SEED], ids="seed{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_masks_are_those_of_philox(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Stream i for adapter i, in forward, in dx and in dA, to the bit on every instruction set."""
    m, k, ps = 37, 71, [0.5, 0.25, 0.0, 0.875, 1.0, 2.0**-33]
    args = mask_args(m, k, ps, seed, dtype)
    _, h = ops.multi_lora_linear(*args)
    want = [philox.factors((m, k), p, seed, i).float() for i, p in enumerate(ps)]
    assert torch.equal(h, torch.cat(want, 1))
    # With dy = 1, one row of ones as A and B = 1: dx is the sum of the masks, dA the sum over rows of each.
    x, weights, rest = args[0], args[1:6], args[10:]
    a, b = [torch.ones(1, k)] * len(ps), [torch.ones(1, 1)] * len(ps)
    dy, h = [torch.ones(m, 1, dtype=dtype)], torch.zeros(m, len(ps))
    needs = (True, [True] * len(ps), [False] * len(ps))
    dx, da, _ = ops.multi_lora_linear_backward(dy, x, h, *weights, a, b, *rest, *needs)
    assert torch.equal(dx, sum(want).to(dtype))
    for got, mask in zip(da, want, strict=True):
        torch.testing.assert_close(got, mask.sum(0, keepdim=True), rtol=1e-6, atol=0)


def test_a_mask_does_not_depend_on_the_groups(backend: str) -> None:
    """An adapter that serves some rows drops there what it would drop if it served all."""
    m, k, ps = 21, 12, [0.5, 0.5, 0.3]
    row_group = torch.arange(m) // 2 % 4
    _, everything = ops.multi_lora_linear(*mask_args(m, k, ps, SEED, torch.float32))
    _, h = ops.multi_lora_linear(*mask_args(m, k, ps, SEED, torch.float32, row_group))
    for i in range(len(ps)):
        served = (row_group == i)[:, None]
        columns = slice(i * k, (i + 1) * k)
        assert torch.equal(h[:, columns], everything[:, columns] * served), i


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9], ids="p{}".format)
def test_masks_are_independent(backend: str, p: float) -> None:
    """Keep rate, and agreement of two adapters' masks, within 5 standard deviations."""
    m, k = 300, 64
    _, h = ops.multi_lora_linear(*mask_args(m, k, [p] * 3, SEED, torch.float32))
    masks = [part != 0 for part in h.split(k, 1)]
    _, h = ops.multi_lora_linear(*mask_args(m, k, [p], SEED + 1, torch.float32))
    masks.append(h != 0)
    for mask in masks:
        assert abs(mask.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / (m * k)) ** 0.5
    agreement = p**2 + (1 - p) ** 2
    for i in range(4):
        for j in range(i):
            got = (masks[i] == masks[j]).double().mean().item()
            assert abs(got - agreement) < 5 * (agreement * (1 - agreement) / (m * k)) ** 0.5, (i, j)


# Rows that an adapter does not serve


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("groups", ["runs", "alternating", "nobody", "absent"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_other_groups_rows_are_untouched(backend: str, dtype: torch.dtype, groups: str, base: str) -> None:
    """To the bit: y and dx are those of the base alone and h is 0, whatever the adapter holds."""
    c = MultiCase(multi_case(m=41, base=base, dtype=dtype, groups=groups, p=0.3))
    alone = MultiCase(multi_case(m=41, base=base, dtype=dtype, groups="none", adapters="", p=0.3))
    assert c.row_group is not None
    for a, b in zip(c.a, c.b, strict=True):
        a[0], b[1] = float("nan"), float("inf")
    y, h = ops.multi_lora_linear(*c.forward_args)
    plain_y, plain_h = ops.multi_lora_linear(*alone.forward_args)
    dx, _, _ = ops.multi_lora_linear_backward(*c.backward_args(h))
    plain_dx, _, _ = ops.multi_lora_linear_backward(*alone.backward_args(plain_h))
    untouched_everywhere = torch.ones(41, dtype=torch.bool)
    begin = 0
    for i, a in enumerate(c.a):
        elsewhere = c.row_group != c.group[i]
        if backend != "reference":  # which multiplies by 0
            assert (h[elsewhere, begin : begin + a.shape[0]] == 0).all()
        begin += a.shape[0]
        untouched_everywhere &= elsewhere
    if backend == "reference":
        return
    for j in range(2):
        untouched = torch.ones(41, dtype=torch.bool)
        for i, layer in enumerate(c.layer):
            untouched &= (c.row_group != c.group[i]) | (layer != j)
        assert torch.equal(y[j][untouched], plain_y[j][untouched]), j
        assert groups == "absent" or not y[j][~untouched].isfinite().all(), j
    assert torch.equal(dx[untouched_everywhere], plain_dx[untouched_everywhere])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_other_groups_rows_are_not_summed(backend: str, dtype: torch.dtype) -> None:
    """What rows hold that nobody serves reaches no gradient of an adapter."""
    if backend == "reference":
        pytest.skip("reference: multiplies by 0")
    c = MultiCase(multi_case(m=41, dtype=dtype, groups="nobody", needs="ab"))
    assert c.row_group is not None
    _, h = ops.multi_lora_linear(*c.forward_args)
    clean = named_gradients(c, "ab", *ops.multi_lora_linear_backward(*c.backward_args(h, "ab")))
    for t in (c.x, *c.dy):
        t[c.row_group == -1] = float("nan")
    got = named_gradients(c, "ab", *ops.multi_lora_linear_backward(*c.backward_args(h, "ab")))
    assert_same(got, clean)


def test_a_layer_does_not_see_the_adapters_of_others(backend: str) -> None:
    c = MultiCase(multi_case(layers=3, adapters="02", groups="none"))
    alone = MultiCase(multi_case(layers=3, adapters="", groups="none"))
    y, _ = ops.multi_lora_linear(*c.forward_args)
    plain, _ = ops.multi_lora_linear(*alone.forward_args)
    assert torch.equal(y[1], plain[1])
    assert not torch.equal(y[0], plain[0]) and not torch.equal(y[2], plain[2])


# Determinism


def everything(c: MultiCase) -> dict[str, Tensor]:
    y, h = ops.multi_lora_linear(*c.forward_args)
    gradients = ops.multi_lora_linear_backward(*c.backward_args(h))
    return named_outputs(y, h) | named_gradients(c, "xab", *gradients)


BIG = {"m": 70, "k": 576, "n": 200, "layers": 3, "adapters": "0120", "p": 0.3, "base": "various"}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype) -> None:
    """Also after the kernels' scratch memory has held NaN; and no input is changed."""
    c = MultiCase(multi_case(**BIG, dtype=dtype))
    inputs = [c.x, *c.dy, *c.a, *c.b, *c.bias, c.seed, c.row_group, *c.weights[0]]
    before = [t.clone() for t in inputs]
    first = everything(c)
    poisoned = MultiCase(multi_case(**BIG, dtype=dtype, groups="none"))
    for t in (poisoned.x, *poisoned.a, *poisoned.b):
        t.fill_(float("nan"))
    everything(poisoned)
    again = everything(c)
    assert_same(again, first)
    assert all(value.isfinite().all() for value in again.values())
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_threads_do_not_change_a_bit(backend: str, dtype: torch.dtype) -> None:
    if backend in ("reference", "simt", "triton"):
        pytest.skip(f"{backend}: torch's own matmul may split sums by threads")
    # The base of a dense layer is torch's own product.
    c = MultiCase(multi_case(**(BIG | {"base": "nested"}), dtype=dtype))
    same_with_any_threads(lambda: everything(c).values())


def test_flags_do_not_change_a_bit(backend: str) -> None:
    c = MultiCase(multi_case(dtype=torch.bfloat16, base="various"))
    _, h = ops.multi_lora_linear(*c.forward_args)
    all_of_them = named_gradients(c, "xab", *ops.multi_lora_linear_backward(*c.backward_args(h)))
    for needs in ("", "x", "a", "b", "some", "ab"):
        got = named_gradients(c, needs, *ops.multi_lora_linear_backward(*c.backward_args(h, needs)))
        assert_same(got, {name: all_of_them[name] for name in got})


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 0, 96), (2, 3, 96), (2, 1, 3, 96)], ids=str)
def test_leading_dimensions_are_kept(backend: str, shape: tuple[int, ...]) -> None:
    rows = int(np.prod(shape[:-1]))
    c = MultiCase(multi_case(m=rows, groups="nobody"))
    flat = everything(c)
    c.forward_args = (c.x.view(shape), *c.forward_args[1:])
    c.x, c.dy = c.x.view(shape), [d.view(*shape[:-1], d.shape[1]) for d in c.dy]
    for name, value in everything(c).items():
        if name[0] in "yh":
            assert value.shape[:-1] == shape[:-1], name
        testing.assert_close(value.view(flat[name].shape), flat[name], flat[name].double(), name)


def test_no_layers(backend: str) -> None:
    x, empty = testing.tensor(3, 8), [[]] * 5
    y, h = ops.multi_lora_linear(x, *empty, [], [], [], [], [], [], [], None, [], None, None)
    assert list(y) == [] and h.shape == (3, 0)
    rest = ([], [], [], [], [], None, [], None, None)
    for need in (False, True):
        dx, da, db = ops.multi_lora_linear_backward([], x, h, *empty, *rest, need, [], [])
        assert torch.equal(dx, torch.zeros(3, 8) if need else torch.empty(0))
        assert list(da) == [] and list(db) == []


# What the C++ refuses


def good_arguments() -> dict[str, Any]:
    """A call that fits: a dense layer and an NF4 one, an adapter each."""
    nf4 = testing.nf4_weight(5, 8, 32, double_quant=False)._state.op_args
    return {
        "x": torch.ones(3, 8),
        "weight": [torch.ones(4, 8), nf4[0]],
        "absmax": [None, nf4[1]],
        "absmax2": [None, None],
        "offset": [None, None],
        "blocksize": [0, 32],
        "out_features": [4, 5],
        "bias": [torch.ones(4), torch.empty(0)],
        "lora_a": [torch.ones(2, 8), torch.ones(3, 8)],
        "lora_b": [torch.ones(4, 2), torch.ones(5, 3)],
        "layer": [0, 1],
        "scaling": [1.0, 2.0],
        "dropout_p": [0.5, 0.0],
        "seed": torch.tensor(3),
        "group": [0, 1],
        "row_group": torch.tensor([0, 1, 0]),
        "compute_dtype": None,
    }


def good_backward_arguments() -> dict[str, Any]:
    extra = {"dy": [torch.ones(3, 4), torch.ones(3, 5)], "x": torch.ones(3, 8), "h": torch.ones(3, 5)}
    rest = {name: value for name, value in good_arguments().items() if name not in ("out_features", "bias")}
    return extra | rest | {"need_dx": True, "need_da": [True, True], "need_db": [True, True]}


A, B, TWO, ones = "lora_a", "lora_b", "expected 2 of each like", torch.ones
COMPUTE_64 = {"compute_dtype": torch.float64}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_b-list": (f"{TWO} lora_a", {B: [ones(4, 2)]}),
    "layer-list": (f"{TWO} lora_a", {"layer": [0]}),
    "scaling-list": (f"{TWO} lora_a", {"scaling": [1.0, 2.0, 3.0]}),
    "list-dropout_p": (f"{TWO} lora_a", {"dropout_p": []}),
    "group-list": (f"{TWO} lora_a", {"group": [0]}),
    "absmax-list": (f"{TWO} weight", {"absmax": [None]}),
    "absmax2-list": (f"{TWO} weight", {"absmax2": [None] * 3}),
    "offset-list": (f"{TWO} weight", {"offset": []}),
    "blocksize-list": (f"{TWO} weight", {"blocksize": [0]}),
    "layer-high": ("layer: expected 0 to 1, got 2", {"layer": [0, 2]}),
    "layer-negative": ("layer: expected 0 to 1, got -1", {"layer": [-1, 1]}),
    "seed-none": ("seed: expected an int64 tensor of one element with dropout_p 0.5", {"seed": None}),
    "seed-dtype": ("seed: expected Long, got Float", {"seed": torch.tensor(3.0)}),
    "seed-int32": ("seed: expected Long, got Int", {"seed": torch.tensor(3, dtype=torch.int32)}),
    "seed-elements": ("seed: expected 1 elements, got 2", {"seed": torch.tensor([3, 4])}),
    "dropout_p-high": ("dropout_p: expected 0 to 1, got 1.5", {"dropout_p": [0.5, 1.5]}),
    "dropout_p-negative": ("dropout_p: expected 0 to 1, got -0.1", {"dropout_p": [-0.1, 0.0]}),
    "dropout_p-nan": ("dropout_p: expected 0 to 1, got nan", {"dropout_p": [0.0, float("nan")]}),
    "row_group-dtype": (
        "row_group: expected Long, got Int",
        {"row_group": torch.zeros(3).int()},
    ),
    "row_group-long": (
        r"row_group: expected shape \[3\], got \[4\]",
        {"row_group": torch.zeros(4).long()},
    ),
    "row_group-2d": (
        r"row_group: expected shape \[3\], got \[3, 1\]",
        {"row_group": torch.zeros(3, 1).long()},
    ),
    "lora_a-features": (
        r"lora_a: expected shape \[3, 8\], got \[3, 7\]",
        {A: [ones(2, 8), ones(3, 7)]},
    ),
    "lora_a-1d": ("lora_a: expected 2 dimensions, got 1", {A: [ones(8), ones(3, 8)]}),
    "lora_a-bf16": ("lora_a: expected Float", {A: [ones(2, 8).bfloat16(), ones(3, 8)]}),
    "lora_a-fp64": ("lora_a: expected float32, bfloat16", {A: [ones(2, 8).double(), ones(3, 8)]}),
    "lora_b-rows": ("lora_b: expected ", {B: [ones(6, 2), ones(5, 3)]}),
    "lora_b-rows-few": ("lora_b: expected ", {B: [ones(4, 2), ones(4, 3)]}),
    "lora_b-rank": (
        r"lora_b: expected shape \[4, 2\], got \[4, 3\]",
        {B: [ones(4, 3), ones(5, 3)]},
    ),
    "layer-swapped": ("lora_b: expected ", {"layer": [1, 0]}),
    "weight-features": ("weight: expected shape", {"weight": [ones(4, 9), ones(20).byte()]}),
    "weight-dtype": ("weight: expected Float", {"weight": [ones(4, 8).half(), ones(20).byte()]}),
    "packed-short": (
        "packed: expected 20 bytes, got 19",
        {"weight": [ones(4, 8), ones(19).byte()]},
    ),
    "absmax-short": ("absmax: expected 2 elements, got 1", {"absmax": [None, ones(1)]}),
    "compute_dtype": ("compute_dtype: expected float32, bfloat16 or float16, got Double", COMPUTE_64),
    "compute_dtype-weight": ("weight: expected BFloat16, got Float", {"compute_dtype": torch.bfloat16}),
    "x-features": ("lora_a: expected shape", {"x": ones(3, 9)}),
    "x-scalar": ("x: expected at least 1 dimension", {"x": ones(())}),
    "x-fp64": ("expected", {"x": ones(3, 8).double()}),
}
FORWARD_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bias-list": ("bias: expected 2 like weight, got 1", {"bias": [torch.empty(0)]}),
    "out_features-list": (f"{TWO} weight", {"out_features": [4]}),
    "out_features": ("weight: expected shape", {"out_features": [3, 5]}),
    "out_features-nf4": ("packed: expected 24 bytes, got 20", {"out_features": [4, 6]}),
    "bias-nf4": (r"bias: expected shape \[5\], got \[4\]", {"bias": [torch.empty(0), ones(4)]}),
    "bias-nf4-dtype": ("bias: expected Float", {"bias": [torch.empty(0), ones(5).bfloat16()]}),
    "bias-dense": (r"bias: expected shape \[4\], got \[3\]", {"bias": [ones(3), torch.empty(0)]}),
    "bias-dense-one": (r"bias: expected shape \[4\], got \[1\]", {"bias": [ones(1), torch.empty(0)]}),
}
BACKWARD_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "dy-list": ("dy: expected 2 like weight, got 1", {"dy": [ones(3, 4)]}),
    "dy-rows": (r"dy: expected shape \[3, 5\], got \[2, 5\]", {"dy": [ones(3, 4), ones(2, 5)]}),
    "dy-features": ("expected", {"dy": [ones(3, 3), ones(3, 5)]}),
    "dy-dimensions": (
        "dy: expected 2 dimensions like x, got 3",
        {"dy": [ones(1, 3, 4), ones(3, 5)]},
    ),
    "dy-scalar": ("dy: expected 2 dimensions like x, got 0", {"dy": [ones(()), ones(3, 5)]}),
    "dy-dtype": ("dy: expected Float, got Half", {"dy": [ones(3, 4).half(), ones(3, 5)]}),
    "h-columns": (r"h: expected shape \[3, 5\], got \[3, 4\]", {"h": ones(3, 4)}),
    "h-dtype": ("h: expected Float, got BFloat16", {"h": ones(3, 5).bfloat16()}),
    "need_da-list": ("need_da, need_db: expected 2 of each like lora_a, got 1, 2", {"need_da": [True]}),
    "need_db-list": ("need_da, need_db: expected 2 of each like lora_a, got 2, 3", {"need_db": [True] * 3}),
}


@pytest.mark.parametrize("name", [*REFUSED, *FORWARD_REFUSED])
def test_forward_refuses(compiled_ops: Any, name: str) -> None:
    message, change = (REFUSED | FORWARD_REFUSED)[name]
    op, good = compiled_ops.multi_lora_linear, good_arguments()
    op(*good.values())
    with pytest.raises(RuntimeError, match=message):
        op(*(good | change).values())


@pytest.mark.parametrize("name", [*REFUSED, *BACKWARD_REFUSED])
def test_backward_refuses(compiled_ops: Any, name: str) -> None:
    message, change = (REFUSED | BACKWARD_REFUSED)[name]
    op, good = compiled_ops.multi_lora_linear_backward, good_backward_arguments()
    op(*good.values())
    with pytest.raises(RuntimeError, match=message):
        op(*(good | change).values())


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith(("seed-", "dropout_p-"))])
def test_lora_linear_refuses(compiled_ops: Any, name: str) -> None:
    message, change = REFUSED[name]
    p = max(change.get("dropout_p", [0.5]), key=lambda p: not 0 <= p <= 1)
    rest = (p, change.get("seed", torch.tensor(3)), None)
    x, dy, h, w = ones(3, 8), ones(3, 4), ones(3, 2), ones(4, 8)
    adapter, dense, flags = (ones(2, 8), ones(4, 2), 1.0), (w, None, None, None, 0), (True,) * 3
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.lora_linear(x, *dense, None, *adapter, *rest)
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.lora_linear_backward(dy, x, h, *dense, *adapter, *rest, *flags)
