"""The ops of bottleneck adapters on every back end, against their definition in fp64."""

from __future__ import annotations

from typing import Any

import philox
import pytest
import torch
import torch.nn.functional as F
from gradient_cases import ACTIVATIONS, FUNCTIONS
from numbers_policy import DTYPES, case_id, short
from test_gradient_needs import assert_saved, saved_by
from torch import Tensor
from torch.autograd import gradcheck

import peft_kernels as pk
import testing

ops = torch.ops.peft_kernels
EPS, SEED = 1e-5, 77
PARTS = ("x", "residual", "norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.usefixtures("nan_outputs")

CASES = testing.pairwise(
    activation=ACTIVATIONS,
    norm=(False, True),
    beside=(False, True),
    biases=(True, False),
    dtype=DTYPES,
    parameters=("same", "fp32"),
    p=(0.0, 0.3, 1.0),
    m=(1, 7, 130, 0),
    k=(1, 33, 96),
    r=(1, 5, 48),
)


def tensors(case: dict[str, Any]) -> dict[str, Tensor | None]:
    """By the names of arguments; those that a case has not are None."""
    m, k, r = case["m"], case["k"], case["r"]
    n = k + 3 if case["beside"] else k
    dtype = case["dtype"]
    kept = dtype if case["parameters"] == "same" else torch.float32
    norm = (
        1 + testing.tensor(k, dtype=kept, seed=3, scale=0.2) if case["norm"] else None,
        testing.tensor(k, dtype=kept, seed=4) if case["norm"] and case["biases"] else None,
    )
    biases = [
        testing.tensor(size, dtype=kept, seed=i) if case["biases"] else None for i, size in ((5, r), (6, n))
    ]
    down = testing.tensor(r, k, dtype=kept, seed=7, scale=k**-0.5)
    up = testing.tensor(n, r, dtype=kept, seed=8, scale=r**-0.5)
    residual = testing.tensor(1, m, n, dtype=dtype, seed=2) if case["beside"] else None
    x = testing.tensor(1, m, k, dtype=dtype, seed=1, scale=2.0)
    return dict(zip(PARTS, (x, residual, *norm, down, biases[0], up, biases[1]), strict=True))


def define(t: dict[str, Any], case: dict[str, Any]) -> Tensor:
    """In torch's own functions, in the dtype of the tensors."""
    x = t["x"]
    normed = (
        x
        if t["norm_weight"] is None
        else F.layer_norm(x, x.shape[-1:], t["norm_weight"], t["norm_bias"], EPS)
    )
    value = FUNCTIONS[case["activation"]](F.linear(normed, t["down"], t["down_bias"]))
    if case["p"]:
        value = value * philox.factors(tuple(value.shape), case["p"], SEED).to(value.dtype)
    return (x if t["residual"] is None else t["residual"]) + 0.5 * F.linear(value, t["up"], t["up_bias"])


def run(call: Any, t: dict[str, Any], case: dict[str, Any]) -> Tensor:
    x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias = (t[name] for name in PARTS)
    rest = (case["activation"], 0.5, case["p"], torch.tensor(SEED) if case["p"] else None)
    y: Tensor = call(x, residual, norm_weight, norm_bias, EPS, down, down_bias, up, up_bias, *rest)[0]
    return y


def with_gradients(call: Any, t: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """`dtype`: what the output's gradient is rounded to, in whatever precision it is used."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in t.items() if value is not None}
    y = call(t | leaves)
    dy = testing.tensor(*y.shape, dtype=dtype, seed=9).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def widened(t: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: None if value is None else value.to(dtype) for name, value in t.items()}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_value_and_gradients(backend: str, case: dict[str, Any]) -> None:
    t, dtype = tensors(case), case["dtype"]
    before = [value.clone() for value in t.values() if value is not None]
    got = with_gradients(lambda t: run(ops.bottleneck, t, case), t, dtype)
    truth = with_gradients(lambda t: define(t, case), widened(t, torch.float64), dtype)
    # The same maths in fp32, rounded where results are.
    plain = with_gradients(lambda t: define(t, case), widened(t, torch.float32), dtype)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        like = t.get(name if name != "y" else "x")
        assert like is not None and value.dtype == like.dtype and value.is_contiguous(), name
        # A kink of relu, or rows of a norm that are all one value, may turn on a rounding: judged where not.
        testing.assert_close(value, plain[name].to(value.dtype), truth[name], name)
    after = [value for value in t.values() if value is not None]
    assert all(map(torch.equal, after, before)), "an input was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("beside", [False, True])
def test_an_up_of_zeros_is_the_identity_to_the_bit(backend: str, beside: bool, dtype: torch.dtype) -> None:
    """Signs of zero and subnormal numbers included, whatever the signs in the bottleneck."""
    x = testing.tensor(9, 40, dtype=dtype)
    x[0] = torch.tensor([0.0, -0.0] * 20)
    x[1, ::3], x[2, ::2], x[3] = 1e-40, -1e-40, -0.0
    residual = x.flip(0) if beside else None
    down, zeros = testing.tensor(5, 40, dtype=dtype, seed=1), torch.zeros(40, 5, dtype=dtype)
    for scaling in (1.0, -4.0):
        for up in (zeros, -zeros):
            for up_bias in (None, torch.zeros(40), torch.full((40,), -0.0)):
                y = pk.bottleneck(x, down, up, None, up_bias, "gelu", scaling, residual)
                want = x if residual is None else residual
                assert torch.equal(y, want) and torch.equal(torch.signbit(y), torch.signbit(want))


def test_zeros_hide_no_nan(backend: str) -> None:
    x, down, up = testing.tensor(4, 40), testing.tensor(5, 40, seed=1), torch.zeros(40, 5)
    x[1, 3] = NAN
    x[2, 0] = INF
    y = pk.bottleneck(x, down, up)
    assert y[1].isnan().all() and y[2].isnan().any()
    assert torch.equal(y[[0, 3]], x[[0, 3]])


@pytest.mark.parametrize(
    "trained", ["x", "residual", "norm_bias", "down", "down_bias", "up", "up_bias", "x up"]
)
def test_only_what_is_trained_gets_a_gradient(backend: str, trained: str) -> None:
    case = {"m": 5, "k": 33, "r": 4, "norm": True, "beside": True, "biases": True, "p": 0.3}
    case |= {"dtype": torch.float32, "parameters": "same", "activation": "gelu"}
    t = tensors(case)
    everything = with_gradients(lambda t: run(ops.bottleneck, t, case), t, torch.float32)
    for name in trained.split():
        t[name] = t[name].requires_grad_()  # type: ignore[union-attr]
    y = run(ops.bottleneck, t, case)
    y.backward(testing.tensor(*y.shape, seed=9))
    for name, value in t.items():
        assert value is not None
        assert (value.grad is not None) == (name in trained.split())
        assert value.grad is None or torch.equal(value.grad, everything[name]), name


def test_x_and_the_bottleneck_are_saved(backend: str) -> None:
    case = {"m": 5, "k": 33, "r": 4, "norm": True, "beside": True, "biases": True, "p": 0.3}
    case |= {"dtype": torch.bfloat16, "parameters": "same", "activation": "silu"}
    t: Any = {name: value.requires_grad_() for name, value in tensors(case).items() if value is not None}
    seed = torch.tensor(SEED)
    args = (t["x"], t["residual"], t["norm_weight"], t["norm_bias"], EPS, t["down"], t["down_bias"])
    (y, z), saved = saved_by(lambda: ops.bottleneck(*args, t["up"], t["up_bias"], "silu", 0.5, 0.3, seed))
    assert y.requires_grad and not z.requires_grad and z.dtype == torch.float32
    kept = ("x", "norm_weight", "norm_bias", "down", "up")
    assert_saved(saved, {"z": z, "seed": seed} | {name: t[name] for name in kept})


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gradcheck(activation: str) -> None:
    case = {"m": 3, "k": 6, "r": 4, "norm": True, "beside": True, "biases": True, "p": 0.3}
    case |= {"dtype": torch.float64, "parameters": "same", "activation": activation}
    t: Any = tensors(case)
    leaves = [t[name].requires_grad_() for name in PARTS]
    with pk.use_backend("reference"):
        assert gradcheck(lambda *args: run(ops.bottleneck, dict(zip(PARTS, args, strict=True)), case), leaves)


X, DOWN, UP = (testing.tensor(*s) for s in ((2, 6), (3, 6), (6, 3)))
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "activation": ("activation: expected one of .*relu, got 'tanh'", {"activation": "tanh"}),
    "down": (r"down: expected shape \(r, 6\), got \(3, 5\)", {"down": torch.ones(3, 5)}),
    "up": (r"up: expected shape \(out_features, 3\), got \(6, 2\)", {"up": torch.ones(6, 2)}),
    "width": ("up: expected 6 output features like x, its residual, got 5", {"up": torch.ones(5, 3)}),
    "bias": (r"up_bias: expected shape \(6,\), got \(3,\)", {"up_bias": torch.ones(3)}),
    "dtype": ("down_bias: expected torch.float32 like x or float32, got torch.float16",
              {"down_bias": torch.ones(3).half()}),
    "norm": ("norm_bias: expected a norm_weight beside it, got none", {"norm_bias": torch.ones(6)}),
    "residual": (r"residual: expected torch.float32 of shape \(2, 6\) on cpu, got .* \(6,\)",
                 {"residual": torch.ones(6)}),
    "p": ("dropout_p: expected 0 to 1, got 1.5", {"dropout_p": 1.5}),
    "x": ("x: expected a floating dtype", {"x": torch.ones(2, 6, dtype=torch.int64)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    message, options = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        pk.bottleneck(**{"x": X, "down": DOWN, "up": UP} | options)


def test_dropout_follows_torchs_seed() -> None:
    def call() -> Tensor:
        torch.manual_seed(5)
        return pk.bottleneck(X, DOWN, UP, activation="gelu", dropout_p=0.5)

    assert torch.equal(call(), call()) and not torch.equal(
        call(), pk.bottleneck(X, DOWN, UP, activation="gelu")
    )
