"""Gradients: through torch's autograd on every back end, against fp64; gradcheck on the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import peft_kernels as pk
from peft_kernels import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
N, K, R, SCALING = 48, 96, 8, 0.8

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)


def leaf(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return testing.tensor(*shape, dtype=dtype, seed=seed, scale=scale).requires_grad_()


def inputs(dtype: torch.dtype, base: str, adapter: torch.dtype, bias: torch.dtype | None) -> dict[str, Any]:
    """Leaves of a lora_linear call; `weight` is an NF4Weight or a trainable dense leaf."""
    weight: Tensor
    if base == "dense":
        weight = leaf(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    else:
        weight = testing.nf4_weight(N, K, double_quant=base == "nested")
    return {
        "x": leaf(5, 3, K, dtype=dtype, seed=2),
        "weight": weight,
        "lora_a": leaf(R, K, dtype=adapter, seed=3, scale=K**-0.5),
        "lora_b": leaf(N, R, dtype=adapter, seed=4, scale=R**-0.5),
        "bias": None if bias is None else leaf(N, dtype=bias, seed=5),
    }


def fp64_gradients(leaves: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """Autograd in fp64 over the definition of the layer."""
    wide: dict[str, Any] = {}
    for name, value in leaves.items():
        if isinstance(value, pk.NF4Weight):
            wide[name] = value.dequantize(torch.float32).double()
        elif value is not None:
            wide[name] = value.detach().double().requires_grad_()
    y = wide["x"] @ wide["weight"].t()
    if "bias" in wide:
        y = y + wide["bias"]
    if "lora_a" in wide:
        y = y + SCALING * (wide["x"] @ wide["lora_a"].t()) @ wide["lora_b"].t()
    y.backward(dy.double())
    return {name: value.grad for name, value in wide.items() if value.grad is not None}


def clear(leaves: dict[str, Any]) -> None:
    for value in leaves.values():
        if value is not None:
            value.grad = None


def call(leaves: dict[str, Any]) -> Tensor:
    if "lora_a" not in leaves:
        return pk.nf4_linear(leaves["x"], leaves["weight"], leaves["bias"])
    return pk.lora_linear(
        leaves["x"], leaves["weight"], leaves["lora_a"], leaves["lora_b"], SCALING, leaves["bias"]
    )


def gradients(leaves: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    clear(leaves)
    call(leaves).backward(dy)
    return {
        name: value.grad for name, value in leaves.items() if value is not None and value.grad is not None
    }


def check_gradients(leaves: dict[str, Any], dtype: torch.dtype) -> None:
    dy = testing.tensor(5, 3, N, dtype=dtype, seed=6)
    truth = fp64_gradients(leaves, dy)
    got = gradients(leaves, dy)
    with pk.use_backend("reference"):
        plain = gradients(leaves, dy)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert value.dtype == leaves[name].dtype and value.shape == leaves[name].shape, name
        testing.assert_close(value, plain[name], truth[name], f"gradient of {name}")
        # The reference is judged against itself above and needs a bound of its own: an fp32 parameter gets a
        # gradient that was never rounded to the activations' dtype.
        assert testing.relative_error(value, truth[name]) <= 4 * torch.finfo(value.dtype).eps, name


@each_dtype
@pytest.mark.parametrize("bias", ["none", "same", "fp32"])
@pytest.mark.parametrize("base", ["plain", "nested"])
def test_nf4_linear_gradients(backend: str, base: str, bias: str, dtype: torch.dtype) -> None:
    bias_dtype = {"none": None, "same": dtype, "fp32": torch.float32}[bias]
    leaves = inputs(dtype, base, torch.float32, bias_dtype)
    del leaves["lora_a"], leaves["lora_b"]
    check_gradients(leaves, dtype)


@each_dtype
@pytest.mark.parametrize("bias", ["none", "same", "fp32"])
@pytest.mark.parametrize("adapter", ["fp32", "same"])
@pytest.mark.parametrize("base", ["dense", "plain", "nested"])
def test_lora_linear_gradients(backend: str, base: str, adapter: str, bias: str, dtype: torch.dtype) -> None:
    bias_dtype = {"none": None, "same": dtype, "fp32": torch.float32}[bias]
    adapter_dtype = torch.float32 if adapter == "fp32" else dtype
    check_gradients(inputs(dtype, base, adapter_dtype, bias_dtype), dtype)


@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "bias", "weight", "lora_a lora_b", "x bias"])
def test_only_what_is_trained_gets_a_gradient(backend: str, trained: str) -> None:
    leaves = inputs(torch.float32, "dense", torch.float32, torch.float32)
    dy = testing.tensor(5, 3, N, seed=6)
    everything = gradients(leaves, dy)
    for name, value in leaves.items():
        value.requires_grad_(name in trained.split())
    got = gradients(leaves, dy)
    assert got.keys() == set(trained.split())
    for name, value in got.items():
        assert torch.equal(value, everything[name]), name


@each_dtype
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_backward_twice(backend: str, base: str, dtype: torch.dtype) -> None:
    """With retain_graph the second backward gives the same bits, and neither changes what it reads."""
    leaves = inputs(dtype, base, torch.float32, dtype)
    dy = testing.tensor(5, 3, N, dtype=dtype, seed=6)
    y = call(leaves)
    before = {name: value.detach().clone() for name, value in leaves.items()} | {
        "dy": dy.clone(),
        "y": y.clone(),
    }
    state = leaves["weight"].state_dict() if base == "nested" else {}
    saved = {name: tensor.clone() for name, tensor in state.items()}
    results = []
    for retain in (True, False):
        clear(leaves)
        y.backward(dy, retain_graph=retain)
        results.append({name: v.grad.clone() for name, v in leaves.items() if v.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 4 + (base == "dense")
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    now = leaves | {"dy": dy, "y": y}
    for name, value in before.items():
        if not isinstance(value, pk.NF4Weight):
            assert torch.equal(now[name], value), f"{name} was changed"
    for name, tensor in saved.items():
        assert torch.equal(state[name], tensor), f"{name} was changed"


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("shape", ["expanded", "non-contiguous", "one row", "no rows", "vector"])
def test_upstream_gradient_of_any_layout(backend: str, shape: str, base: str) -> None:
    """`y.sum().backward()` sends an expanded gradient with stride 0."""
    weight = inputs(torch.float32, base, torch.float32, None)["weight"]
    rows = {"one row": 1, "no rows": 0}.get(shape, 6)
    x = leaf(*([] if shape == "vector" else [rows]), K, dtype=torch.float32, seed=2)
    bias = leaf(N, dtype=torch.float32, seed=5)
    a, b = leaf(R, K, dtype=torch.float32, seed=3), leaf(N, R, dtype=torch.float32, seed=4)
    if shape == "expanded":
        dy = torch.ones(()).expand(rows, N)
    elif shape == "non-contiguous":
        dy = testing.tensor(N, rows, seed=6).t()
    else:
        dy = testing.tensor(*x.shape[:-1], N, seed=6)
    leaves = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "bias": bias}
    truth = fp64_gradients(leaves, dy)
    got = gradients(leaves, dy)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert testing.relative_error(value, truth[name]) <= 1e-6, name


# fp64, on the reference


@pytest.fixture
def _reference() -> Any:
    with pk.use_backend("reference"):
        yield


def fp64_leaf(*shape: int, seed: int) -> Tensor:
    return leaf(*shape, dtype=torch.float64, seed=seed)


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_gradcheck_nf4_linear(nested: bool) -> None:
    weight = testing.nf4_weight(5, 7, 32, nested)
    x, bias = fp64_leaf(2, 3, 7, seed=1), fp64_leaf(5, seed=2)
    assert gradcheck(lambda x, bias: pk.nf4_linear(x, weight, bias), (x, bias))
    assert gradgradcheck(lambda x, bias: pk.nf4_linear(x, weight, bias), (x, bias))


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_gradcheck_lora_linear(base: str) -> None:
    x, a, b, bias = (fp64_leaf(*s, seed=i) for i, s in enumerate([(2, 3, 7), (4, 7), (5, 4), (5,)]))
    if base == "dense":
        weight = fp64_leaf(5, 7, seed=9)
        assert gradcheck(
            lambda x, w, a, b, bias: pk.lora_linear(x, w, a, b, 0.7, bias), (x, weight, a, b, bias)
        )
    else:
        nf4 = testing.nf4_weight(5, 7, 32)
        assert gradcheck(lambda x, a, b, bias: pk.lora_linear(x, nf4, a, b, 0.7, bias), (x, a, b, bias))


def test_double_backward_of_nf4_linear(backend: str) -> None:
    """d/d(dy) of |dx|^2 / 2 = W W^T dy: the backward's own gradient is the forward product."""
    weight = testing.nf4_weight(N, K)
    x = leaf(4, K, dtype=torch.float32, seed=1)
    dy = leaf(4, N, dtype=torch.float32, seed=2)
    (dx,) = torch.autograd.grad(pk.nf4_linear(x, weight), x, dy, create_graph=True)
    (got,) = torch.autograd.grad(dx.pow(2).sum() / 2, dy)
    w = weight.dequantize().double()
    assert testing.relative_error(got, dy.detach().double() @ w @ w.t()) <= 1e-6


def test_double_backward_of_lora_linear_is_refused(backend: str) -> None:
    """There is no formula for it: an error, never a gradient with a part left out."""
    leaves = inputs(torch.float32, "nested", torch.float32, None)
    (dx,) = torch.autograd.grad(call(leaves).pow(2).sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.pow(2).sum(), leaves["lora_a"])


def test_no_gradient_leaks_into_h_or_the_weight(backend: str) -> None:
    leaves = inputs(torch.float32, "nested", torch.float32, None)
    state = leaves["weight"]._state
    y, h = torch.ops.peft_kernels.lora_linear(
        leaves["x"], *state.op_args, None, leaves["lora_a"], leaves["lora_b"], SCALING, 0.0, None
    )
    assert y.requires_grad and not h.requires_grad
    with torch.no_grad():
        assert not call(leaves).requires_grad
