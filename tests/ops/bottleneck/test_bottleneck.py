"""The ops of bottleneck adapters on every back end, against their definition in fp64."""

from __future__ import annotations

from typing import Any

import philox
import pytest
import torch
import torch.nn.functional as F
from gradient_cases import ACTIVATIONS, FUNCTIONS
from lora_cases import UNSCALED
from numbers_policy import DTYPES, case_id, each_dtype, same_with_any_threads, short
from rounding import ONE_LAYER
from skips import require
from test_gradient_needs import assert_saved, saved_by
from torch import Tensor
from torch.autograd import gradcheck

import peft_kernels as pk
import testing

ops = torch.ops.peft_kernels
EPS, SEED = 1e-5, 77
PARTS = ("x", "residual", "norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.usefixtures("nan_outputs", "one_thread")

CASES = testing.pairwise(
    activation=ACTIVATIONS,
    norm=(False, True),
    beside=(False, True),
    biases=(True, False),
    dtype=DTYPES,
    parameters=("same", "fp32"),
    p=(0.0, 0.3, 1.0),
    m=(7, 130, 0),
    k=(7, 33, 96),
    r=(5, 48),
)


def tensors(case: dict[str, Any]) -> dict[str, Tensor | None]:
    """Arguments by name; None where a case has none."""
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
    of_down, of_up, of_scaling = case.get("large", UNSCALED)
    down, up = down * of_down, up * of_up
    of_biases = min(of_down, 1.0), 1 / of_scaling
    biases = [b if b is None else b * factor for b, factor in zip(biases, of_biases, strict=True)]
    residual = testing.tensor(1, m, n, dtype=dtype, seed=2) if case["beside"] else None
    x = testing.tensor(1, m, k, dtype=dtype, seed=1, scale=2.0)
    return dict(zip(PARTS, (x, residual, *norm, down, biases[0], up, biases[1]), strict=True))


def scaling_of(case: dict[str, Any]) -> float:
    return 0.5 * float(case.get("large", UNSCALED)[2])


def define(t: dict[str, Any], case: dict[str, Any]) -> Tensor:
    """The definition in torch functions, in the tensors' dtype."""
    x = t["x"]
    normed = (
        x
        if t["norm_weight"] is None
        else F.layer_norm(x, x.shape[-1:], t["norm_weight"], t["norm_bias"], EPS)
    )
    value = FUNCTIONS[case["activation"]](F.linear(normed, t["down"], t["down_bias"]))
    if case["p"]:
        value = value * philox.factors(tuple(value.shape), case["p"], SEED).to(value.dtype)
    delta = scaling_of(case) * F.linear(value, t["up"], t["up_bias"])
    return (x if t["residual"] is None else t["residual"]) + delta


def run(call: Any, t: dict[str, Any], case: dict[str, Any]) -> Tensor:
    x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias = (t[name] for name in PARTS)
    rest = (case["activation"], scaling_of(case), case["p"], torch.tensor(SEED) if case["p"] else None)
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


Results = dict[str, tuple[Tensor, Tensor, Tensor]]


def results(case: dict[str, Any]) -> Results:
    """The op's results, plain torch in fp32 with rounded results, and the truth."""
    t, dtype = tensors(case), case["dtype"]
    before = [value.clone() for value in t.values() if value is not None]
    got = with_gradients(lambda t: run(ops.bottleneck, t, case), t, dtype)
    assert all(map(torch.equal, [value for value in t.values() if value is not None], before))
    plain, truth = (
        with_gradients(lambda t: define(t, case), widened(t, wide), dtype)
        for wide in (torch.float32, torch.float64)
    )
    assert got.keys() == truth.keys()
    for name, value in got.items():
        like = t["x" if name == "y" else name]
        assert like is not None and value.dtype == like.dtype and value.is_contiguous(), name
    return {name: (got[name], plain[name].to(got[name].dtype), truth[name]) for name in got}


def judge(case: dict[str, Any]) -> None:
    for name, (got, plain, truth) in results(case).items():
        testing.assert_close(got, plain, truth, name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_value_and_gradients(backend: str, case: dict[str, Any]) -> None:
    judge(case)


WIDE = testing.pairwise(
    dtype=DTYPES, parameters=("same", "fp32"), p=(0.0, 0.3), beside=(False, True), m=(17, 150)
)


@pytest.mark.parametrize("case", WIDE, ids=case_id)
def test_more_ranks_and_features_than_a_tile(backend: str, case: dict[str, Any]) -> None:
    judge(case | {"k": 140, "r": 130, "norm": False, "biases": True, "activation": "gelu_tanh"})


@pytest.mark.parametrize("parameters", ["same", "fp32"])
@pytest.mark.parametrize("m,r,norm", [(515, 48, False), (259, 70, False), (300, 33, True)])
def test_many_rows(backend: str, m: int, r: int, norm: bool, parameters: str) -> None:
    """Several chunks of rows, the last of odd length; small, large and odd ranks."""
    if backend in ("ptx", "triton"):
        pytest.skip(f"{backend}: these are the CPU kernel's chunks")
    case = {"m": m, "k": 96, "r": r, "norm": norm, "beside": norm, "biases": True, "p": 0.3}
    judge(case | {"dtype": torch.bfloat16, "parameters": parameters, "activation": "silu"})


@pytest.mark.parametrize("parameters", ["same", "fp32"])
@pytest.mark.parametrize("k", [801, 1602])
def test_more_features_than_a_panel_has_rows(backend: str, k: int, parameters: str) -> None:
    if backend in ("ptx", "triton"):
        pytest.skip(f"{backend}: these are the CPU kernel's panels")
    case = {"m": 31, "k": k, "r": 33, "norm": False, "beside": False, "biases": True, "p": 0.0}
    judge(case | {"dtype": torch.bfloat16, "parameters": parameters, "activation": "silu"})


@pytest.mark.parametrize("beside", [False, True])
def test_rounded_to_bf16_as_torch_rounds(backend: str, beside: bool) -> None:
    """To the bit: ties, subnormal numbers, what is too large, NaN; among others in a vector, and alone."""
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: computed by other instructions, which flush subnormal numbers or do not")
    odd = [1e-40, -3e-39, 1.17e-38, -1e-45, NAN, INF, -INF, 3.4e38, -3.4e38, 1.00390625, 1.01171875, -0.5]
    sums = torch.cat([torch.tensor(odd).repeat_interleave(16), testing.tensor(16), torch.tensor(odd)])
    x = torch.zeros(2, len(sums), dtype=torch.bfloat16)
    x[1] = testing.tensor(len(sums), dtype=torch.bfloat16, scale=1e-38)
    residual = x.flip(0) if beside else None
    down, up = torch.zeros(3, len(sums)), torch.zeros(len(sums), 3)
    y = pk.bottleneck(x, down, up, None, sums, "relu", 1.0, residual)
    want = ((x if residual is None else residual).float() + sums).bfloat16()
    bits = torch.where(want.isnan(), 0x7FC0, want.view(torch.int16))  # torch has several NaNs
    assert torch.equal(y.view(torch.int16), bits)


@each_dtype
@pytest.mark.parametrize("r", [48, 5, 70])
def test_a_rows_bits_do_not_depend_on_the_others(backend: str, r: int, dtype: torch.dtype) -> None:
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: torch's products may add in another order where rows are more")
    x, down, up = (testing.tensor(*s, dtype=dtype) for s in ((150, 96), (r, 96), (96, r)))
    whole = pk.bottleneck(x, down, up, activation="gelu")
    for row in (0, 40, 149):
        assert torch.equal(pk.bottleneck(x[row], down, up, activation="gelu"), whole[row])


@pytest.mark.parametrize("m,k,r", [(1, 1, 1), (1, 33, 1), (9, 1, 5)])
def test_single_rows_and_features(backend: str, m: int, k: int, r: int) -> None:
    case = {"m": m, "k": k, "r": r, "norm": k > 1, "beside": m == 1, "biases": True, "p": 0.0}
    # Not gelu: the error of its derivative, which test_gated bounds, would be all there is to one row.
    judge(case | {"dtype": torch.float32, "parameters": "same", "activation": "silu"})


@each_dtype
@pytest.mark.parametrize("beside", [False, True])
def test_an_up_of_zeros_is_the_identity_to_the_bit(backend: str, beside: bool, dtype: torch.dtype) -> None:
    check_identity(9, beside, dtype)


def check_identity(m: int, beside: bool, dtype: torch.dtype) -> None:
    """Signs of zeros and subnormals included, for any signs in the bottleneck."""
    x = testing.tensor(m, 40, dtype=dtype)
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
    x[2, 0], down[0, 0] = INF, 1.0  # else ReLU might remove all of Inf
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: torch's own functions may split their work by threads")
    case = {"m": 301, "k": 96, "r": 24, "norm": True, "beside": False, "biases": True, "p": 0.3}
    case |= {"parameters": "same", "activation": "gelu", "dtype": dtype}
    t = tensors(case)
    same_with_any_threads(lambda: with_gradients(lambda t: run(ops.bottleneck, t, case), t, dtype).values())


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
    "empty": (r"down: expected elements, got shape \(0, 6\)",
              {"down": torch.ones(0, 6), "up": torch.ones(6, 0)}),
    "width": ("up: expected 6 output features like x, its residual, got 5", {"up": torch.ones(5, 3)}),
    "bias": (r"up_bias: expected shape \(6,\), got \(3,\)", {"up_bias": torch.ones(3)}),
    "dtype": ("down_bias: expected torch.float32 like x or float32, got torch.float16",
              {"down_bias": torch.ones(3).half()}),
    "norm": ("norm_bias: expected a norm_weight too, got none", {"norm_bias": torch.ones(6)}),
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


def test_transforms_differentiate_at_zero() -> None:
    """Under torch.func the reference is differentiated: an `up` of zeros still has a gradient."""
    zeros = torch.zeros_like(UP)
    got = torch.func.grad(lambda up: pk.bottleneck(X, DOWN, up, activation="gelu").square().sum())(zeros)
    up = zeros.clone().requires_grad_()
    pk.bottleneck(X, DOWN, up, activation="gelu").square().sum().backward()
    assert up.grad is not None and up.grad.any() and testing.relative_error(got, up.grad) < ONE_LAYER


def test_dropout_follows_torchs_seed() -> None:
    def call() -> Tensor:
        torch.manual_seed(5)
        return pk.bottleneck(X, DOWN, UP, activation="gelu", dropout_p=0.5)

    assert torch.equal(call(), call()) and not torch.equal(
        call(), pk.bottleneck(X, DOWN, UP, activation="gelu")
    )


WRONG = {
    "z": ("z: expected shape", {2: torch.ones(2, 4)}),
    "dy": ("dy: expected shape", {0: torch.ones(2, 5)}),
    "z-dtype": ("z: expected Float, got BFloat16", {2: torch.ones(2, 3).bfloat16()}),
    "up": ("up: expected shape", {7: torch.ones(6, 2)}),
    "down": ("x: expected 5 features, got 6", {6: torch.ones(3, 5)}),
    "norm": ("norm_weight: expected shape", {3: torch.ones(5)}),
    "seed": ("seed: expected an int64 tensor", {10: 0.5}),
    "activation": ("activation: expected silu", {8: "tanh"}),
    "double": ("x: expected float32", {1: torch.ones(2, 6).double()}),
}


def wrong_args(name: str) -> tuple[str, list[Any]]:
    message, changes = WRONG[name]
    args: list[Any] = [
        torch.ones(2, 6), X, torch.ones(2, 3), torch.ones(6), None, EPS, DOWN, UP, "gelu", 1.0, 0.0, None,
        True, True, True, True, True, True, True,
    ]  # fmt: skip
    for place, value in changes.items():
        args[place] = value
    return message, args


@pytest.mark.parametrize("name", WRONG)
def test_the_kernel_checks_for_itself(compiled_ops: Any, name: str) -> None:
    """Checks for memory safety in the op itself."""
    message, args = wrong_args(name)
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.bottleneck_backward(*args)


def test_the_kernel_checks_the_residual(compiled_ops: Any) -> None:
    rest = (None, None, EPS, DOWN, None, UP, None, "relu", 1.0, 0.0, None)
    for residual, message in (
        (torch.ones(2, 5), "residual: expected shape"),
        (torch.ones(2, 6).half(), "residual: expected Float, got Half"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compiled_ops.bottleneck(X, residual, *rest)


def test_an_x_that_is_no_residual_is_not_read_as_one(compiled_ops: Any) -> None:
    of_five, rest = torch.ones(5, 3), ("relu", 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="up: expected 6 rows like x"):
        compiled_ops.bottleneck(X, None, None, None, EPS, DOWN, None, of_five, None, *rest)
    args = torch.ones(2, 5), X, torch.ones(2, 3), None, None, EPS, DOWN, of_five, *rest, True, True
    with pytest.raises(RuntimeError, match="up: expected 6 rows like x"):
        compiled_ops.bottleneck_backward(*args, False, True, True, True, True)


def test_one_launch_each_way_in_triton() -> None:
    """And one for the gradients of both factors; with a layer norm the reference runs."""
    require("triton")
    from peft_kernels.triton_kernels.core import launch

    noted: list[str] = []
    case = {"m": 5, "k": 33, "r": 4, "beside": False, "biases": True, "activation": "gelu"}
    case |= {"dtype": torch.bfloat16, "parameters": "fp32", "p": 0.3}
    for norm, want in (
        (False, ["bottleneck_kernel", "bottleneck_backward_kernel", "over_rows_kernel"]),
        (True, []),
    ):
        t = tensors(case | {"norm": norm})
        with testing.running_on("triton"), launch.recording(lambda kernel, *_: noted.append(kernel.__name__)):
            with_gradients(lambda t: run(ops.bottleneck, t, case), t, torch.bfloat16)
        assert noted == want
        noted.clear()
