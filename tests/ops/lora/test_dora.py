"""dora_scale, its backward op and dora_norm on every back end, against fp64."""

from __future__ import annotations

from typing import Any

import philox
import pytest
import torch
from gradient_cases import assert_near
from lora_cases import BEYOND_FP16, LoraCase, lora_case
from numbers_policy import (
    DTYPES,
    Result,
    assert_within_rounding,
    case_id,
    check_odd_addresses,
    dense64,
    each_dtype,
    in_range,
    same_with_any_threads,
    transposed,
)
from rounding import ONE_LAYER
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels import NF4Weight
from peft_kernels.ops.lora.dropout import new_seed

ops = torch.ops.peft_kernels
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.usefixtures("nan_outputs")


@each_dtype
@pytest.mark.parametrize("bias", ["none", "same", "fp32"])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 200])
def test_dora_scale(backend: str, n: int, bias: str, dtype: torch.dtype) -> None:
    scale = testing.tensor(n, seed=2)
    b = (
        None
        if bias == "none"
        else testing.tensor(n, dtype=dtype if bias == "same" else torch.float32, seed=3)
    )
    added = torch.zeros(n).double() if b is None else b.double()
    for m in (0, 1, 2, 31, 33, 130):
        z, dy = testing.tensor(m, n, dtype=dtype), testing.tensor(m, n, dtype=dtype, seed=1)
        wide, d, s = z.double(), dy.double(), scale.double()
        reference, backward = testing.reference_op("dora_scale"), testing.reference_op("dora_scale_backward")
        y = ops.dora_scale(z, scale, b)
        dz, dscale = ops.dora_scale_backward(dy, z, scale, b)
        plain_dz, plain_dscale = backward(dy, z, scale, b)
        assert dscale.shape == scale.shape and dscale.dtype == torch.float32
        rest = wide - added
        size = wide.abs() + ((s - 1) * rest).abs() + (s - 1).abs() * added.abs()
        for name, result in {
            "y": Result(y, reference(z, scale, b), wide + (s - 1) * rest, size),
            "dz": Result(dz, plain_dz, d * s, (d * s).abs()),
            "dscale": Result(
                dscale, plain_dscale, (d * rest).sum(0), (d.abs() * (wide.abs() + added.abs())).sum(0)
            ),
        }.items():
            assert result.got.shape == result.truth.shape and result.got.dtype == result.plain.dtype, name
            assert_within_rounding(result.got, result.truth, result.magnitude, max(m, 1), f"{name}, m {m}")
            if result.got.numel() > 60:
                result.check(max(m, 1), f"{name}, m {m}")


@each_dtype
def test_dora_scale_by_one_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    z = testing.tensor(9, 71, dtype=dtype)
    assert torch.equal(ops.dora_scale(z, torch.ones(71), testing.tensor(71, seed=1, scale=30.0)), z)


def test_dora_scale_sums_many_rows(backend: str) -> None:
    """Terms of one sign: a single fp32 chain would drift."""
    z, dy = testing.tensor(20_000, 3).abs(), testing.tensor(20_000, 3, seed=1).abs()
    _, got = ops.dora_scale_backward(dy, z, torch.ones(3), None)
    assert testing.relative_error(got, (dy.double() * z.double()).sum(0)) < 2e-6


@each_dtype
def test_dora_scale_of_extreme_values(backend: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1e-40, -6e-8, 1e4, -65504.0, 3e38, INF, -INF, NAN])
    z, scale = values.to(dtype).repeat(10, 1).t().contiguous(), values
    want = (z.float() * scale).to(dtype)
    got = ops.dora_scale(z, scale, None)
    torch.testing.assert_close(got, want, equal_nan=True)
    dz, _ = ops.dora_scale_backward(z, torch.ones_like(z), scale, None)
    torch.testing.assert_close(dz, (z.float() * scale).to(dtype), equal_nan=True)


def test_dora_scale_keeps_a_bad_column(backend: str) -> None:
    """NaN in one column of dy reaches no other column."""
    z, dy, scale = testing.tensor(40, 71), testing.tensor(40, 71, seed=1), testing.tensor(71)
    clean_dz, clean = ops.dora_scale_backward(dy, z, scale, None)
    for column in (0, 63, 64, 70):
        bad = dy.clone()
        bad[39, column] = NAN
        others = [i for i in range(71) if i != column]
        dz, dscale = ops.dora_scale_backward(bad, z, scale, None)
        assert dscale[column].isnan() and torch.equal(dscale[others], clean[others])
        assert torch.equal(dz[:39], clean_dz[:39]) and torch.equal(dz[:, others], clean_dz[:, others])


def test_dora_scale_reads_views(backend: str) -> None:
    z, dy, scale, bias = (testing.tensor(*s, seed=i) for i, s in enumerate([(6, 35), (6, 35), (35,), (35,)]))
    steps = torch.stack((scale, bias), 1)
    want = [ops.dora_scale(z, scale, bias), *ops.dora_scale_backward(dy, z, scale, bias)]
    got = [ops.dora_scale(transposed(z), steps[:, 0], steps[:, 1])]
    got += ops.dora_scale_backward(transposed(dy), transposed(z), steps[:, 0], steps[:, 1])
    cube = [ops.dora_scale(z.view(2, 3, 35), scale, bias)]
    cube += ops.dora_scale_backward(dy.view(2, 3, 35), z.view(2, 3, 35), scale, bias)
    for a, b, c in zip(got, cube, want, strict=True):
        assert b.shape == (c.shape if c.dim() == 1 else (2, 3, 35))
        assert testing.relative_error(a, c) <= ONE_LAYER  # torch may sum views in another order
        assert testing.relative_error(b.reshape(c.shape), c) <= ONE_LAYER
        assert backend == "reference" or (torch.equal(a, c) and torch.equal(b.reshape(c.shape), c))


@each_dtype
def test_dora_scale_at_odd_addresses(backend: str, dtype: torch.dtype) -> None:
    x, y = (testing.tensor(24, 64, dtype=dtype, seed=i) for i in range(2))
    scale = testing.tensor(64)
    check_odd_addresses(backend, lambda *args: (ops.dora_scale(*args),), (x, scale, scale))
    check_odd_addresses(backend, ops.dora_scale_backward, (x, y, scale, scale))


def test_dora_with_any_threads(backend: str) -> None:
    if backend == "reference":
        pytest.skip("reference: torch's own functions may split their work by threads")
    z, dy, scale = testing.tensor(700, 200), testing.tensor(700, 200, seed=1), testing.tensor(200)
    weight, a, b = testing.nf4_weight(300, 576), testing.tensor(8, 576), testing.tensor(300, 8)

    def run() -> list[Tensor]:
        results = [ops.dora_scale(z, scale, None), *ops.dora_scale_backward(dy, z, scale, None)]
        return [*results, ops.dora_norm(*weight._state.op_args, a, b, 0.5)]

    same_with_any_threads(run)


def test_dora_scale_refuses(compiled_ops: Any) -> None:
    ops, z, scale = compiled_ops, torch.ones(2, 3), torch.ones(3)
    for message, call in (
        (r"scale: expected shape \[3\], got \[2\]", lambda: ops.dora_scale(z, torch.ones(2), None)),
        (
            r"scale: expected shape \[3\], got \[2\]",
            lambda: ops.dora_scale_backward(z, z, torch.ones(2), None),
        ),
        ("scale: expected Float, got Half", lambda: ops.dora_scale(z, scale.half(), None)),
        (r"bias: expected shape \[3\], got \[4\]", lambda: ops.dora_scale(z, scale, torch.ones(4))),
        (
            r"dy: expected shape \[2, 3\], got \[1, 3\]",
            lambda: ops.dora_scale_backward(z[:1], z, scale, None),
        ),
        ("dy: expected Float, got Half", lambda: ops.dora_scale_backward(z.half(), z, scale, None)),
        ("z: expected at least 1 dimension, got 0", lambda: ops.dora_scale(z.sum(), scale, None)),
        ("z: expected float32, bfloat16", lambda: ops.dora_scale(z.double(), scale, None)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


DORA_RANGES = BEYOND_FP16 | {
    "delta": {"adapter": "fp32", "large": (2.0**10, 1.0, 2.0**8)},
    "fp16-delta": {"adapter": "same", "large": (2.0**6, 2.0**6, 2.0**6)},
}
"""Also scaling B A x, of which the magnitudes leave a small part."""


@pytest.mark.parametrize("large", DORA_RANGES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dora_linear_beyond_fp16(backend: str, p: float, large: str) -> None:
    c = LoraCase(lora_case(17, 128, 192, "nested", torch.float16) | DORA_RANGES[large] | {"bias": "same"})
    magnitude = 1 + testing.tensor(128, seed=7).abs()

    def results(call: Any, widen: Any) -> dict[str, Tensor]:
        leaves = [widen(t).detach().clone().requires_grad_() for t in (c.x, c.a, c.b, magnitude, c.bias)]
        torch.manual_seed(5)
        y = call(*leaves)
        gradients = torch.autograd.grad(y, leaves, widen(c.dy))
        names = ("y", "dx", "da", "db", "dmagnitude", "dbias")
        return dict(zip(names, (y.detach(), *gradients), strict=True))

    def define(x: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        dropped = x if not p else x * philox.factors(tuple(x.shape), p, int(new_seed(c.x)))
        w, delta = c.w.to(x.dtype), c.scaling * b @ a
        scale = m / (w + delta.detach()).norm(dim=1)
        return (x - dropped) @ w.t() + scale * (dropped @ (w + delta).t()) + bias

    def call(x: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        return pk.dora_linear(x, weight, a, b, m, c.scaling, bias, p)

    weight = testing.nf4_weight(128, 192)
    assert torch.equal(dense64(weight), c.w)
    got = results(call, lambda t: t)
    with pk.use_backend("reference"):
        plain = results(call, lambda t: t)
    truth = results(define, Tensor.double)
    for name, value in got.items():
        if in_range(truth[name], value.dtype) or name in ("y", "dx"):
            assert_near(value, plain[name], truth[name], name, inside=torch.float16)


NORM_CASES = testing.pairwise(
    n=(0, 1, 7, 33, 100),
    k=(1, 7, 33, 96, 576, 1100),
    r=(1, 3, 8, 33, 70),
    base=("nf4", "nested", "fp32", "bf16", "fp16"),
    bs=(32, 64, 4096),
    a_dtype=DTYPES,
    b_dtype=DTYPES,
    layout=("contiguous", "transposed"),
)
NORM_SCALING = 1.7
LONG = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def norm_base(case: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor]:
    n, k, base = case["n"], case["k"], case["base"]
    if base in LONG:
        dense = testing.tensor(n, k, dtype=LONG[base], seed=1, scale=k**-0.5)
        return (
            transposed(dense) if case["layout"] == "transposed" else dense,
            None,
            None,
            None,
            0,
        ), dense.double()
    weight = testing.nf4_weight(n, k, case["bs"], base == "nested")
    return weight._state.op_args, dense64(weight)


def check_norm(group: tuple[Any, ...], w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The square, a sum of terms of both signs, is exact up to rounding; the norm is not."""
    got = ops.dora_norm(*group, a, b, scaling)
    assert got.shape == (w.shape[0],) and got.dtype == torch.float32
    truth = (w + scaling * b.double() @ a.double()).square().sum(1)
    w, a, b = w.abs(), a.double().abs(), b.double().abs()
    size = w.square().sum(1) + (2 * abs(scaling) * (w @ a.t()) * b).sum(1)
    size = size + (scaling**2 * (b @ (a @ a.t())) * b).sum(1)
    assert_within_rounding(got.double().square().float(), truth, 2 * size, w.shape[1] + a.shape[0], "norm^2")
    return got


def check_norm_case(case: dict[str, Any]) -> None:
    """With A `a_size` times as large, and B smaller by the same factor."""
    group, w = norm_base(case)
    n, k, r, size = case["n"], case["k"], case["r"], case.get("a_size", 1.0)
    a = testing.tensor(r, k, dtype=case["a_dtype"], seed=3, scale=k**-0.5 * size)
    b = testing.tensor(n, r, dtype=case["b_dtype"], seed=4, scale=r**-0.5 / size)
    if case["layout"] == "transposed":
        a, b = transposed(a), transposed(b)
    got = check_norm(group, w, a, b, NORM_SCALING)
    if n > 60 and k > 1:
        plain = testing.reference_op("dora_norm")(*group, a, b, NORM_SCALING)
        testing.assert_close(got, plain, (w + NORM_SCALING * b.double() @ a.double()).norm(dim=1))


@pytest.mark.parametrize("case", NORM_CASES, ids=case_id)
def test_dora_norm(backend: str, case: dict[str, Any]) -> None:
    check_norm_case(case)


@pytest.mark.parametrize("base", ["nf4", "nested", "fp32"])
@pytest.mark.parametrize("r", [1, 8, 9, 33])
def test_dora_norm_keeps_all_bits_of_its_terms(backend: str, r: int, base: str) -> None:
    """The terms have one sign and are most of the norm, so bits lost by a factor add up. With random signs
    they would be lost in the rounding of w . w."""
    n, k = 70, 576
    if base == "fp32":
        w = testing.tensor(n, k, seed=1).abs()
        group: tuple[Any, ...] = (w, None, None, None, 0)
        dense = w.double()
    else:
        weight = NF4Weight.quantize(testing.tensor(n, k, seed=1).abs(), 64, base == "nested")
        group, dense = weight._state.op_args, dense64(weight)
    a, b = testing.tensor(r, k, seed=3).abs(), testing.tensor(n, r, seed=4).abs()
    check_norm(group, dense, a, b, 0.05 / r)


@pytest.mark.parametrize("base", ["nested", "fp32", "bf16"])
def test_dora_norm_without_a_delta(backend: str, base: str) -> None:
    """B = 0, as at the start of training, or A = 0, or scaling 0: the norm of the base, never NaN."""
    group, w = norm_base({"n": 33, "k": 100, "base": base, "bs": 64, "layout": "contiguous"})
    a, b = testing.tensor(1, 100, seed=3), testing.tensor(33, 1, seed=4)
    for one, other, scaling in ((a, 0 * b, 2.0), (0 * a, b, 2.0), (a, b, 0.0), (0 * a, 0 * b, 0.0)):
        got = ops.dora_norm(*group, one, other, scaling)
        assert_within_rounding(got, w.norm(dim=1), w.norm(dim=1), 100, "norm")


def test_dora_norm_of_zero_rows(backend: str) -> None:
    """W = 0 gives the norm of the delta; all zero gives 0."""
    w = torch.zeros(5, 40)
    a, b = testing.tensor(1, 40), testing.tensor(5, 1)
    b[2] = 0
    got = ops.dora_norm(w, None, None, None, 0, a, b, -0.5)
    assert got[2] == 0
    assert_within_rounding(
        got, (0.5 * b @ a).double().norm(dim=1), (0.5 * b @ a).double().norm(dim=1), 40, "norm"
    )
    assert torch.equal(ops.dora_norm(w, None, None, None, 0, 0 * a, b, 1.0), torch.zeros(5))


@pytest.mark.parametrize("scaling", [1.0, -0.25, 3.0], ids="scaling{}".format)
@pytest.mark.parametrize("rank", [1, 4])
def test_dora_norm_of_a_delta_that_cancels_the_base(backend: str, rank: int, scaling: float) -> None:
    """Rounding may make the square negative: the norm is then 0, not NaN."""
    a, b = testing.tensor(rank, 200, seed=3), testing.tensor(64, rank, seed=4)
    w = (-scaling * (b.double() @ a.double())).float()
    got = check_norm((w, None, None, None, 0), w.double(), a, b, scaling)
    assert got.isfinite().all() and (got >= 0).all()
    assert (got.double() <= 2e-3 * w.double().norm(dim=1)).all()


def test_dora_norm_propagates_nan(backend: str) -> None:
    w = testing.tensor(5, 40)
    w[1, 39], w[3, 0] = NAN, INF
    got = ops.dora_norm(w, None, None, None, 0, testing.tensor(2, 40), testing.tensor(5, 2), 1.0)
    assert not got[[1, 3]].isfinite().any() and got[[0, 2, 4]].isfinite().all()


def test_dora_norm_refuses(compiled_ops: Any) -> None:
    ops, w, a, b = compiled_ops, torch.ones(5, 40), torch.ones(2, 40), torch.ones(5, 2)
    rest = (None, None, None, 0)
    for message, args in (
        ("lora_a, lora_b: expected 2 dimensions, got 1, 2", (w, *rest, a[0], b)),
        (r"lora_b: expected shape \[5, 2\], got \[5, 3\]", (w, *rest, a, torch.ones(5, 3))),
        (r"weight: expected shape \[6, 40\], got \[5, 40\]", (w, *rest, a, torch.ones(6, 2))),
        (r"weight: expected shape \[5, 41\], got \[5, 40\]", (w, *rest, torch.ones(2, 41), b)),
        ("lora_a: expected float32, bfloat16", (w, *rest, a.double(), b)),
        ("lora_b: expected float32, bfloat16", (w, *rest, a, b.double())),
        ("expected", (w.double(), *rest, a, b)),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dora_norm(*args, 1.0)
