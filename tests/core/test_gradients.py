"""Gradients of the ops through torch's autograd on every back end, against fp64 and their backward ops."""

from __future__ import annotations

from typing import Any

import philox
import pytest
import torch
from gradient_cases import (
    ACTIVATIONS,
    ADAPTERS,
    DTYPES,
    SCALING,
    SHORT,
    K,
    Many,
    Mlp,
    N,
    R,
    call,
    check_against_fp64,
    clear,
    fp64_gradients,
    gradients,
    gradients_of,
    inputs,
    leaf,
)
from numbers_policy import pairs

import peft_kernels as pk
import testing

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)


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


BIASES = ("none", "same", "fp32")


@pairs(base=("plain", "nested"), bias=BIASES, dtype=DTYPES)
def test_nf4_linear_gradients(backend: str, base: str, bias: str, dtype: torch.dtype) -> None:
    bias_dtype = {"none": None, "same": dtype, "fp32": torch.float32}[bias]
    leaves = inputs(dtype, base, torch.float32, bias_dtype)
    del leaves["lora_a"], leaves["lora_b"]
    check_gradients(leaves, dtype)


@pairs(base=("dense", "plain", "nested"), adapter=("fp32", "same"), bias=BIASES, dtype=DTYPES)
def test_lora_linear_gradients(backend: str, base: str, adapter: str, bias: str, dtype: torch.dtype) -> None:
    bias_dtype = {"none": None, "same": dtype, "fp32": torch.float32}[bias]
    adapter_dtype = torch.float32 if adapter == "fp32" else dtype
    check_gradients(inputs(dtype, base, adapter_dtype, bias_dtype), dtype)


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


ops = torch.ops.peft_kernels


@each_dtype
@pytest.mark.parametrize("groups", [False, True], ids=["all-rows", "groups"])
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_multi_lora_linear_gradients(backend: str, base: str, groups: bool, dtype: torch.dtype) -> None:
    for adapter in {torch.float32, dtype}:
        check_against_fp64(lambda adapter=adapter: Many(base, dtype, groups, adapter))


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp_gradients(backend: str, activation: str, dtype: torch.dtype) -> None:
    for base, adapters in (("nested", "twice"), ("dense", "all")):
        check_against_fp64(lambda base=base, adapters=adapters: Mlp(base, dtype, adapters, activation))


@pytest.mark.parametrize("base", ["dense", "plain"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_gated_mlp_without_some_adapters(backend: str, adapters: str, base: str) -> None:
    check_against_fp64(lambda: Mlp(base, torch.float32, adapters))


def test_gated_mlp_is_made_of_the_other_ops(backend: str) -> None:
    """Outputs to the bit, and its second product draws its masks from seed + 1."""
    c = Mlp("nested", torch.float32)
    y, gate, up, h, h_down = ops.gated_mlp(*c.args())
    x, weight, absmax, absmax2, offset, blocksize, n, bias, a, b, _, scaling, p, seed, activation = c.args()
    lists = [weight, absmax, absmax2, offset, blocksize, n, bias]
    first, last = [v[:2] for v in lists], [v[2:] for v in lists]
    (want_gate, want_up), want_h = ops.multi_lora_linear(
        x, *first, a[:2], b[:2], [0, 1], scaling[:2], p[:2], seed, [0, 0], None, None
    )
    product = ops.gated_activation(want_gate, want_up, activation)
    (want,), want_h_down = ops.multi_lora_linear(
        product, *last, a[2:], b[2:], [0], scaling[2:], p[2:], seed + 1, [0], None, None
    )
    pairs = zip((y, gate, up, h, h_down), (want, want_gate, want_up, want_h, want_h_down), strict=True)
    assert all(torch.equal(got, value) for got, value in pairs)


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_autograd_of_multi_lora_linear_is_its_backward_op(backend: str, base: str) -> None:
    c = Many(base, torch.bfloat16, groups=True)
    y, got = gradients_of(c)
    with torch.no_grad():
        _, h = ops.multi_lora_linear(*c.args())
        dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(y)]
        dx, da, db = ops.multi_lora_linear_backward(
            dy, c.x, h, c.weight, *c.quantised, c.a, c.b, c.layer, c.scaling, c.p, c.seed, c.group,
            c.row_group, None, True, [True] * 3, [True] * 3,
        )  # fmt: skip
    want = {"x": dx} | {f"a{i}": t for i, t in enumerate(da)} | {f"b{i}": t for i, t in enumerate(db)}
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_autograd_of_lora_linear_with_dropout_is_its_backward_op(backend: str) -> None:
    leaves = inputs(torch.bfloat16, "nested", torch.float32, torch.float32)
    group, seed = leaves["weight"]._state.op_args, torch.tensor(5)
    x, a, b, bias = (leaves[name] for name in ("x", "lora_a", "lora_b", "bias"))
    y, h = ops.lora_linear(x, *group, bias, a, b, SCALING, 0.3, seed, None)
    dy = testing.tensor(*y.shape, dtype=y.dtype, seed=6)
    got = torch.autograd.grad(y, (x, a, b), dy)
    with torch.no_grad():
        want = ops.lora_linear_backward(dy, x, h, *group, a, b, SCALING, 0.3, seed, None, True, True, True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    w = leaves["weight"].dequantize(torch.float32).double()
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    dropped = wide[0] * philox.factors(tuple(x.shape), 0.3, 5)
    truth = torch.autograd.grad(
        wide[0] @ w.t() + SCALING * dropped @ wide[1].t() @ wide[2].t(), wide, dy.double()
    )
    for name, g, t in zip(("x", "lora_a", "lora_b"), got, truth, strict=True):
        assert testing.relative_error(g, t) <= 4 * torch.finfo(g.dtype).eps, name


def test_autograd_of_elementwise_ops_is_their_backward_op(backend: str) -> None:
    gate, up, dy = (leaf(3, 5, dtype=torch.float32, seed=i) for i in (1, 2, 3))
    dy = dy.detach()
    for activation in ACTIVATIONS:
        got = torch.autograd.grad(ops.gated_activation(gate, up, activation), (gate, up), dy)
        want = ops.gated_activation_backward(dy, gate.detach(), up.detach(), activation)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), activation
    scale, bias = leaf(5, dtype=torch.float32, seed=4), leaf(5, dtype=torch.float32, seed=5)
    got = torch.autograd.grad(ops.dora_scale(gate, scale, bias), (gate, scale, bias), dy)
    want = ops.dora_scale_backward(dy, gate.detach(), scale.detach(), bias.detach())
    assert all(torch.equal(g, w) for g, w in zip(got, (*want, (1 - scale) * dy.sum(0)), strict=True))
    seed = torch.tensor(3)
    (got_dx,) = torch.autograd.grad(ops.dropout(gate, 0.4, seed), gate, dy)
    assert torch.equal(got_dx, ops.dropout(dy, 0.4, seed))
