"""gated_activation and its backward op on every back end, against torch's own functions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_cases import FUNCTIONS
from numbers_policy import check_odd_addresses, each_dtype, same_with_any_threads, short, transposed
from torch import Tensor

import peft_kernels as pk
import testing

ops = torch.ops.peft_kernels
INF, NAN = float("inf"), float("nan")
FP32_EPS = torch.finfo(torch.float32).eps
SHAPES: dict[str, tuple[int, ...]] = {
    "none": (0,), "no-rows": (0, 5), "one": (1,), "odd": (3, 7), "lanes": (64,), "odd-big": (5, 333),
    "3-d": (2, 3, 17),
}  # fmt: skip

each_activation = pytest.mark.parametrize("activation", FUNCTIONS)

pytestmark = pytest.mark.usefixtures("nan_outputs")


def value_and_derivative(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = gate.double().requires_grad_()
    value = FUNCTIONS[activation](wide)
    (derivative,) = torch.autograd.grad(value.sum(), wide)
    return value.detach(), derivative


def assert_elements(got: Tensor, truth: Tensor, magnitude: Tensor, what: str) -> None:
    """Rounded once from an activation within a few fp32 roundings of `magnitude`; Inf only by overflow."""
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
    value, derivative = value_and_derivative(gate, activation)
    u, d, size = up.double(), dy.double(), gate.double().abs()
    op, backward = "gated_activation", "gated_activation_backward"
    out, plain = (f(gate, up, activation) for f in (ops.gated_activation, testing.reference_op(op)))
    got_grads, plain_grads = (
        f(dy, gate, up, activation) for f in (ops.gated_activation_backward, testing.reference_op(backward))
    )
    return {
        "out": (out, plain, value * u, size * u.abs()),
        "dgate": (got_grads[0], plain_grads[0], d * u * derivative, (1 + size) * (d * u).abs()),
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
    """Every gate of a 16-bit dtype up to 1e4."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = every[every.abs() <= 1e4]
    for name, (got, _, truth, size) in gated_results(gate, *[torch.ones_like(gate)] * 2, activation).items():
        assert_elements(got, truth, size, name)


def test_silu_keeps_its_bits_where_it_is_small(backend: str) -> None:
    """Relative to itself: other tests compare with |gate|, which hides results for gates far below 0."""
    gate = torch.linspace(-80, 10, 1801)
    sigmoid, size = gate.double().sigmoid(), gate.double().abs()
    results = gated_results(gate, *[torch.ones_like(gate)] * 2, "silu")
    for name, scale in (("out", size), ("dup", size), ("dgate", 1 + size)):
        got, _, truth, _ = results[name]
        assert_elements(got, truth, sigmoid * scale, name)


EXTREMES = (
    0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 6e-8, -6e-8, 1e-5, 0.5, -0.5, 5.0, -5.0, 20.0, -20.0, 86.9,
    -86.9, 88.0, -88.0, 89.0, -89.0, 104.0, -104.0, 1e4, -1e4, 65504.0, -65504.0,
)  # fmt: skip


@each_activation
@each_dtype
def test_gated_activation_of_extreme_values(backend: str, dtype: torch.dtype, activation: str) -> None:
    """Every pair of extreme values; 65504^2 overflows fp16."""
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
def test_gated_activation_of_non_finite_values(backend: str, dtype: torch.dtype, activation: str) -> None:
    """NaN stays NaN in its own element; Inf stays Inf, except where relu is 0."""
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
    if activation == "relu" or backend == "ptx":
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

    def assert_same(got: Tensor, want: Tensor) -> None:
        if backend == "reference":  # torch's functions round by vectors, and by the layout
            torch.testing.assert_close(got, want)
        else:
            assert torch.equal(got, want) and got.shape == want.shape and got.is_contiguous()

    for d, g, u in views:
        got = [ops.gated_activation(g, u, activation), *ops.gated_activation_backward(d, g, u, activation)]
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    assert_same(ops.gated_activation(gate[0, 0], up[0, 0], activation), want[0][0, 0])


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


def test_gated_mlp_drops_in_the_same_places(backend: str) -> None:
    """Of as many features inside as outside, so that one stream for all layers would drop the same places."""
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    features, rank = 24, 4

    def layer(seed: int) -> pk.AdaptedLinear:
        weight = testing.tensor(features, features, seed=seed)
        a, b = testing.tensor(rank, features, seed=seed + 1), testing.tensor(features, rank, seed=seed + 2)
        return pk.AdaptedLinear(weight, None, [pk.Adapter(a.requires_grad_(), b.requires_grad_(), 0.5, 0.4)])

    def results() -> list[Tensor]:
        layers, x = [layer(seed) for seed in (1, 4, 7)], testing.tensor(9, features).requires_grad_()
        torch.manual_seed(5)
        y = pk.gated_mlp(x, *layers)
        leaves = [x, *(t for one in layers for t in (one.adapters[0].lora_a, one.adapters[0].lora_b))]
        return [y, *torch.autograd.grad(y, leaves, testing.tensor(9, features, seed=11))]

    got = results()
    with pk.use_backend("reference"):
        want = results()
    for ours, theirs in zip(got, want, strict=True):
        assert testing.relative_error(ours, theirs) < 1e-5
