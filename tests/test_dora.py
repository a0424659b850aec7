"""gated_activation, dropout, dora_scale and dora_norm, with their backward ops, on every back end.

The truth is torch's own function in fp64, and masks come from a Philox of the tests' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import philox
import pytest
import torch
import torch.nn.functional as F
from numbers_policy import (
    DTYPES,
    Result,
    assert_within_rounding,
    case_id,
    check_odd_addresses,
    dense64,
    same_with_any_threads,
    short,
    transposed,
)
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
INF, NAN = float("inf"), float("nan")
FP32_EPS = torch.finfo(torch.float32).eps
SEED = -987654321012345
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "none": (0,), "no-rows": (0, 5), "one": (1,), "odd": (3, 7), "lanes": (64,), "odd-big": (5, 333),
    "3-d": (2, 3, 17),
}  # fmt: skip

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


pytestmark = pytest.mark.usefixtures("nan_outputs")


# gated_activation


def value_and_slope(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = gate.double().requires_grad_()
    value = ACTIVATIONS[activation](wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    return value.detach(), slope


def assert_elements(got: Tensor, truth: Tensor, magnitude: Tensor, what: str) -> None:
    """Rounded once, of an activation within a few roundings in fp32 of `magnitude`; Inf only by overflow."""
    info = torch.finfo(got.dtype)
    assert got.shape == truth.shape, what
    error = (got.double() - truth).abs()
    bound = info.eps * truth.abs() + 8 * FP32_EPS * magnitude + 2 * info.smallest_normal
    overflows = (truth.abs() > info.max * (1 - info.eps)) & (got.double() == truth.sign() * INF)
    bad = ~((error <= bound) | overflows)
    if bad.any():
        at = int(bad.reshape(-1).nonzero()[0])
        raise AssertionError(
            f"{what}: element {at}: expected {truth.reshape(-1)[at]}, got {got.reshape(-1)[at]}"
        )


def gated_results(gate: Tensor, up: Tensor, dy: Tensor, activation: str) -> dict[str, tuple[Tensor, ...]]:
    """Name: (got, plain, truth, magnitude)."""
    value, slope = value_and_slope(gate, activation)
    u, d, size = up.double(), dy.double(), gate.double().abs()
    op, backward = "gated_activation", "gated_activation_backward"
    out, plain = (f(gate, up, activation) for f in (ops.gated_activation, testing.reference_op(op)))
    got_grads, plain_grads = (
        f(dy, gate, up, activation) for f in (ops.gated_activation_backward, testing.reference_op(backward))
    )
    return {
        "out": (out, plain, value * u, size * u.abs()),
        "dgate": (got_grads[0], plain_grads[0], d * u * slope, (1 + size) * (d * u).abs()),
        "dup": (got_grads[1], plain_grads[1], d * value, size * d.abs()),
    }


@each_activation
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation(backend: str, shape: str, dtype: torch.dtype, activation: str) -> None:
    gate, up, dy = (testing.tensor(*SHAPES[shape], dtype=dtype, seed=i, scale=3.0) for i in (1, 2, 3))
    before = [t.clone() for t in (gate, up, dy)]
    for name, (got, plain, truth, size) in gated_results(gate, up, dy, activation).items():
        assert got.dtype == dtype and got.is_contiguous()
        assert_elements(got, truth, size, name)
        if got.numel() > 60:
            testing.assert_close(got, plain, truth, name)
    assert all(torch.equal(a, b) for a, b in zip((gate, up, dy), before, strict=True)), "an input was changed"


@each_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_gated_activation_of_every_value(backend: str, dtype: torch.dtype, activation: str) -> None:
    """Every gate of a 16-bit type up to 1e4."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = every[every.abs() <= 1e4]
    for name, (got, _, truth, size) in gated_results(gate, *[torch.ones_like(gate)] * 2, activation).items():
        assert_elements(got, truth, size, name)


EXTREMES = (
    0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 6e-8, -6e-8, 1e-5, 0.5, -0.5, 5.0, -5.0, 20.0, -20.0, 86.9,
    -86.9, 88.0, -88.0, 89.0, -89.0, 104.0, -104.0, 1e4, -1e4, 65504.0, -65504.0,
)  # fmt: skip


@each_activation
@each_dtype
def test_gated_activation_of_extreme_values(backend: str, dtype: torch.dtype, activation: str) -> None:
    """Every pair of them, with 65504^2 an overflow of fp16."""
    values = torch.tensor(EXTREMES).to(dtype)
    gate, up = torch.meshgrid(values, values, indexing="ij")
    for dy in (1.0, -2.0):
        results = gated_results(gate, up, torch.full_like(gate, dy), activation)
        for name, (got, _, truth, size) in results.items():
            assert_elements(got, truth, size, name)
    out = ops.gated_activation(gate, up, activation)
    assert dtype != torch.float16 or (out[-2, -2] == INF and out[-2, -1] == -INF)


@each_activation
@each_dtype
def test_gated_activation_of_values_that_are_no_numbers(
    backend: str, dtype: torch.dtype, activation: str
) -> None:
    """NaN stays NaN in its own element; Inf is not made finite, but by the branch of relu that is 0."""
    good = testing.tensor(67, dtype=dtype).abs() + 0.5
    clean = ops.gated_activation(good, good, activation)
    clean_grads = ops.gated_activation_backward(good, good, good, activation)
    for at in (0, 15, 66):
        others = [i for i in range(67) if i != at]
        for bad in (NAN, -NAN, INF):
            wrong = good.clone()
            wrong[at] = bad
            for gate, up in ((wrong, good), (good, wrong)):
                out = ops.gated_activation(gate, up, activation)
                # torch's exact gelu of Inf is NaN, in some of its kernels.
                assert out[at].isnan() if bad != bad else not out[at].isfinite()
                assert torch.equal(out[others], clean[others])
                dgate, dup = ops.gated_activation_backward(good, gate, up, activation)
                assert torch.equal(dgate[others], clean_grads[0][others])
                assert torch.equal(dup[others], clean_grads[1][others])
                assert not (dup if gate is wrong else dgate)[at].isfinite()
            dgate, dup = ops.gated_activation_backward(wrong, good, good, activation)
            assert not dgate[at].isfinite() and not dup[at].isfinite()
            assert torch.equal(dgate[others], clean_grads[0][others])
    low = torch.full((3,), -INF, dtype=dtype)
    out = ops.gated_activation(low, good[:3], activation)
    if activation == "relu" or backend == "simt":
        assert (out == 0).all()
    else:  # NaN, as torch has it
        assert not (out > 0).any()


@each_activation
def test_gated_activation_reads_views(backend: str, activation: str) -> None:
    gate, up, dy = (testing.tensor(9, 35, seed=i) for i in (1, 2, 3))
    want = [ops.gated_activation(gate, up, activation)]
    want += ops.gated_activation_backward(dy, gate, up, activation)
    wide = torch.stack((gate, up), 2)
    views = (transposed(dy), wide[..., 0], transposed(up)), (dy, transposed(gate), wide[..., 1])
    for d, g, u in views:
        got = [ops.gated_activation(g, u, activation), *ops.gated_activation_backward(d, g, u, activation)]
        for a, b in zip(got, want, strict=True):
            if backend == "reference":  # torch's functions round by vectors, and by the layout
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b) and a.is_contiguous()
    scalar = ops.gated_activation(gate[0, 0], up[0, 0], activation)
    assert scalar.shape == () and torch.allclose(scalar, want[0][0, 0], rtol=1e-5)


@each_dtype
def test_gated_activation_at_odd_addresses(backend: str, dtype: torch.dtype) -> None:
    x, y, z = (testing.tensor(24, 64, dtype=dtype, seed=i) for i in range(3))
    check_odd_addresses(backend, lambda *args: (ops.gated_activation(*args, "silu"),), (x, y))
    check_odd_addresses(backend, lambda *args: ops.gated_activation_backward(*args, "gelu"), (x, y, z))


def test_gated_activation_with_any_threads(backend: str) -> None:
    if backend == "reference":
        pytest.skip("reference: torch's own functions may split their work by threads")
    x, y = testing.tensor(3, 50001), testing.tensor(3, 50001, seed=1)
    same_with_any_threads(
        lambda: (ops.gated_activation(x, y, "gelu"), *ops.gated_activation_backward(y, x, y, "silu"))
    )


GATED_REFUSED = {
    "activation": (
        "activation: expected silu, gelu, gelu_tanh or relu, got swish",
        (2, 3),
        torch.float32,
        "swish",
    ),
    "shape": (r"up: expected shape \[2, 3\], got \[3, 2\]", (3, 2), torch.float32, "silu"),
    "dtype": ("up: expected Float, got BFloat16", (2, 3), torch.bfloat16, "silu"),
}


@pytest.mark.parametrize("name", GATED_REFUSED)
def test_gated_activation_refuses(compiled_ops: Any, name: str) -> None:
    message, shape, dtype, activation = GATED_REFUSED[name]
    gate, up = torch.ones(2, 3), torch.ones(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.gated_activation(gate, up, activation)
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.gated_activation_backward(gate, gate, up, activation)
    if name != "activation":
        with pytest.raises(RuntimeError, match=message.replace("up", "dy")):
            compiled_ops.gated_activation_backward(up, gate, gate, activation)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16, got Double"):
        compiled_ops.gated_activation(gate.double(), gate.double(), "silu")


# dropout


def dropout_truth(x: Tensor, p: float, seed: int) -> Tensor:
    """In fp32, rounded once."""
    keep = philox.factors(tuple(x.shape), p, seed).float()
    return (x.float() * keep).to(x.dtype)


@each_dtype
@pytest.mark.parametrize("p", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0], ids="p{}".format)
def test_dropout(backend: str, p: float, dtype: torch.dtype) -> None:
    for numel in (0, 1, 2, 3, 4, 5, 63, 64, 65, 129, 1000, 40003):
        x = testing.tensor(numel, dtype=dtype)
        before = x.clone()
        got = ops.dropout(x, p, torch.tensor(SEED))
        assert got.dtype == dtype and torch.equal(got, dropout_truth(x, p, SEED)), f"numel {numel}"
        assert torch.equal(x, before) and (numel == 0 or got.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)], ids="seed{}".format)
def test_dropout_of_any_seed(backend: str, seed: int) -> None:
    x = torch.ones(7, 35)
    for at in (torch.tensor(seed), torch.tensor([seed])):
        got = ops.dropout(x, 0.5, at)
        assert torch.equal(got, dropout_truth(x, 0.5, seed)) and at.item() == seed
        assert torch.equal(ops.dropout(x, 0.5, at), got)


@pytest.mark.parametrize("p", [2.0**-33, 2.0**-32, 0.75 * 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-40])
def test_dropout_near_the_ends(backend: str, p: float) -> None:
    x = testing.tensor(5000)
    torch.testing.assert_close(ops.dropout(x, p, torch.tensor(3)), dropout_truth(x, p, 3), rtol=1e-6, atol=0)


def test_dropout_threshold(backend: str) -> None:
    """A word that is equal to the threshold keeps its element, the next smaller one drops it."""
    words = philox.words(4000, 9)
    for at in (0, 17, 3999):
        word = int(words[at])
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False), ((word + 0.25) / 2**32, True)):
            got = ops.dropout(torch.ones(4000), p, torch.tensor(9))
            assert (got[at] != 0).item() is kept, (at, p)
            assert torch.equal(got != 0, philox.kept((4000,), p, 9))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9], ids="p{}".format)
def test_dropout_keep_rate(backend: str, p: float) -> None:
    """Within 5 standard deviations, as is the mean, which dropout keeps."""
    count = 200_000
    got = ops.dropout(torch.ones(count), p, torch.tensor(12345))
    rate = (got != 0).double().mean().item()
    assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    assert abs(got.double().mean().item() - 1) < 5 * (p / (1 - p) / count) ** 0.5
    other = ops.dropout(torch.ones(count), p, torch.tensor(12346))
    agreement = p**2 + (1 - p) ** 2
    found = ((got != 0) == (other != 0)).double().mean().item()
    assert abs(found - agreement) < 5 * (agreement * (1 - agreement) / count) ** 0.5


@each_dtype
def test_dropout_of_extreme_values(backend: str, dtype: torch.dtype) -> None:
    """NaN stays, as does Inf where it is kept; the largest number overflows by its scale."""
    info = torch.finfo(dtype)
    values = (NAN, INF, -INF, info.max, -info.max, info.smallest_normal, info.tiny * info.eps, -0.0)
    x = torch.tensor(values).to(dtype).repeat(40)
    got = ops.dropout(x, 0.5, torch.tensor(SEED))
    want = dropout_truth(x, 0.5, SEED)
    assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    assert got.isnan().equal(want.isnan()) and got[x.isnan()].isnan().all()


def test_dropout_reads_views(backend: str) -> None:
    """The mask goes by the logical order of elements."""
    x, seed = testing.tensor(9, 35), torch.tensor(3)
    want = ops.dropout(x, 0.5, seed)
    for view in (transposed(x), torch.stack((x, x), 2)[..., 1], x.view(3, 3, 35)):
        assert torch.equal(ops.dropout(view, 0.5, seed).reshape(9, 35), want)


@each_dtype
def test_dropout_at_odd_addresses(backend: str, dtype: torch.dtype) -> None:
    x, seed = testing.tensor(24, 64, dtype=dtype), torch.tensor(SEED)
    check_odd_addresses(backend, lambda x: (ops.dropout(x, 0.3, seed),), (x,))


def test_dropout_with_any_threads(backend: str) -> None:
    x = testing.tensor(3, 50001)
    same_with_any_threads(lambda: (ops.dropout(x, 0.3, torch.tensor(5)),))


DROPOUT_REFUSED: dict[str, tuple[str, float, Tensor]] = {
    "p-high": ("dropout_p: expected 0 to 1, got 1.5", 1.5, torch.tensor(1)),
    "p-negative": ("dropout_p: expected 0 to 1, got -0.5", -0.5, torch.tensor(1)),
    "p-nan": ("dropout_p: expected 0 to 1, got nan", NAN, torch.tensor(1)),
    "seed-dtype": ("seed: expected Long, got Double", 0.5, torch.tensor(1.0).double()),
    "seed-elements": ("seed: expected 1 elements, got 0", 0.5, torch.empty(0).long()),
}


@pytest.mark.parametrize("name", DROPOUT_REFUSED)
def test_dropout_refuses(compiled_ops: Any, name: str) -> None:
    message, p, seed = DROPOUT_REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.dropout(torch.ones(3), p, seed)


# dora_scale


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
    """Of one sign: one fp32 chain over them would drift."""
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
    """A NaN in one column of dy reaches no other."""
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
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)  # torch may sum views in another order
        torch.testing.assert_close(b.reshape(c.shape), c, rtol=1e-6, atol=1e-6)
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


# dora_norm

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
    """The square is a sum of positive and negative terms: it, not the norm, is exact to rounding."""
    got = ops.dora_norm(*group, a, b, scaling)
    assert got.shape == (w.shape[0],) and got.dtype == torch.float32
    truth = (w + scaling * b.double() @ a.double()).square().sum(1)
    w, a, b = w.abs(), a.double().abs(), b.double().abs()
    size = w.square().sum(1) + (2 * abs(scaling) * (w @ a.t()) * b).sum(1)
    size = size + (scaling**2 * (b @ (a @ a.t())) * b).sum(1)
    assert_within_rounding(got.double().square().float(), truth, 2 * size, w.shape[1] + a.shape[0], "norm^2")
    return got


@pytest.mark.parametrize("case", NORM_CASES, ids=case_id)
def test_dora_norm(backend: str, case: dict[str, Any]) -> None:
    group, w = norm_base(case)
    n, k, r = case["n"], case["k"], case["r"]
    a = testing.tensor(r, k, dtype=case["a_dtype"], seed=3, scale=k**-0.5)
    b = testing.tensor(n, r, dtype=case["b_dtype"], seed=4, scale=r**-0.5)
    if case["layout"] == "transposed":
        a, b = transposed(a), transposed(b)
    got = check_norm(group, w, a, b, NORM_SCALING)
    if n > 60 and k > 1:
        plain = testing.reference_op("dora_norm")(*group, a, b, NORM_SCALING)
        testing.assert_close(got, plain, (w + NORM_SCALING * b.double() @ a.double()).norm(dim=1))


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
    """Rounding may make the square negative: the norm is then 0, and never NaN."""
    a, b = testing.tensor(rank, 200, seed=3), testing.tensor(64, rank, seed=4)
    w = (-scaling * (b.double() @ a.double())).float()
    got = check_norm((w, None, None, None, 0), w.double(), a, b, scaling)
    assert got.isfinite().all() and (got >= 0).all()
    assert (got.double() <= 2e-3 * w.double().norm(dim=1)).all()


def test_dora_norm_lets_nan_through(backend: str) -> None:
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
