"""Gradients of the ops through torch's autograd on every back end, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_cases import (
    ACTIVATIONS,
    ADAPTERS,
    DTYPES,
    SHORT,
    K,
    Mlp,
    MultiLora,
    N,
    R,
    assert_near,
    check_against_fp64,
    fp64_gradients,
    gradients,
    inputs,
    leaf,
)
from lora_cases import BEYOND_FP16
from numbers_policy import pairs
from rounding import ONE_LAYER

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
        assert_near(value, plain[name], truth[name], f"gradient of {name}")


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
        assert testing.relative_error(value, truth[name]) <= ONE_LAYER, name


ops = torch.ops.peft_kernels


@each_dtype
@pytest.mark.parametrize("groups", [False, True], ids=["all-rows", "groups"])
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_multi_lora_linear_gradients(backend: str, base: str, groups: bool, dtype: torch.dtype) -> None:
    for adapter in {torch.float32, dtype}:
        check_against_fp64(lambda adapter=adapter: MultiLora(base, dtype, groups, adapter))


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp_gradients(backend: str, activation: str, dtype: torch.dtype) -> None:
    for base, adapters in (("nested", "twice"), ("dense", "all")):
        check_against_fp64(lambda base=base, adapters=adapters: Mlp(base, dtype, adapters, activation))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("large", ["h", "dh", "scaling", "fp16-scaling"])
def test_gated_mlp_beyond_fp16(backend: str, large: str, activation: str) -> None:
    adapter = torch.float32 if BEYOND_FP16[large]["adapter"] == "fp32" else torch.float16
    check_against_fp64(
        lambda: Mlp("nested", torch.float16, activation=activation, adapter=adapter).scale(large)
    )


@pytest.mark.parametrize("base", ["dense", "plain"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_gated_mlp_without_some_adapters(backend: str, adapters: str, base: str) -> None:
    check_against_fp64(lambda: Mlp(base, torch.float32, adapters))


def test_gated_mlp_equals_its_parts(backend: str) -> None:
    """Bit-equal outputs; dropout of the down projection uses seed + 1."""
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
