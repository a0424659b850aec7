"""gradcheck on the reference; second derivatives are right or raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_cases import ACTIVATIONS, SCALING, K, Mlp, MultiLora, N, inputs, leaf
from rounding import ONE_LAYER
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import peft_kernels as pk
import testing


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
    """d/d(dy) of |dx|^2 / 2 = W W^T dy: the gradient of the backward is the forward op."""
    weight = testing.nf4_weight(N, K)
    x = leaf(4, K, dtype=torch.float32, seed=1)
    dy = leaf(4, N, dtype=torch.float32, seed=2)
    (dx,) = torch.autograd.grad(pk.nf4_linear(x, weight), x, dy, create_graph=True)
    (got,) = torch.autograd.grad(dx.pow(2).sum() / 2, dy)
    w = weight.dequantize().double()
    assert testing.relative_error(got, dy.detach().double() @ w @ w.t()) <= ONE_LAYER


ops = torch.ops.peft_kernels


def gradcheck_layers(c: Any) -> None:
    leaves = c.leaves()

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(leaves, values, strict=True))
        lists = (("w", "weight"), ("bias", "bias"), ("a", "a"), ("b", "b"))
        before = {attribute: getattr(c, attribute) for _, attribute in lists} | {"x": c.x}
        c.x = named["x"]
        for kind, attribute in lists:
            setattr(c, attribute, [named.get(f"{kind}{i}", t) for i, t in enumerate(before[attribute])])
        try:
            return tuple(c.call())
        finally:
            for attribute, value in before.items():
                setattr(c, attribute, value)

    assert gradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("groups", [False, True], ids=["all-rows", "groups"])
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_gradcheck_multi_lora_linear(base: str, groups: bool) -> None:
    gradcheck_layers(MultiLora(base, torch.float64, groups))


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("base,adapters", [("dense", "all"), ("nested", "twice"), ("plain", "no-up")])
def test_gradcheck_gated_mlp(base: str, adapters: str, activation: str) -> None:
    gradcheck_layers(Mlp(base, torch.float64, adapters, activation))


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_gradcheck_lora_linear_with_dropout(p: float) -> None:
    x, a, b, bias = (fp64_leaf(*s, seed=i) for i, s in enumerate([(2, 3, 7), (4, 7), (5, 4), (5,)]))
    w, rest = fp64_leaf(5, 7, seed=9), (0.7, p, torch.tensor(8), None)
    assert gradcheck(
        lambda x, w, a, b, bias: ops.lora_linear(x, w, None, None, None, 0, bias, a, b, *rest)[0],
        (x, w, a, b, bias),
    )


@pytest.mark.usefixtures("_reference")
def test_gradcheck_elementwise_ops() -> None:
    gate, up = fp64_leaf(3, 5, seed=1), fp64_leaf(3, 5, seed=2)
    for activation in ACTIVATIONS:
        assert gradcheck(lambda g, u, name=activation: ops.gated_activation(g, u, name), (gate, up))
    scale, bias = fp64_leaf(5, seed=3), fp64_leaf(5, seed=4)
    assert gradcheck(ops.dora_scale, (gate, scale, bias))
    assert gradcheck(lambda z, scale: ops.dora_scale(z, scale, None), (gate, scale))
    seed = torch.tensor(8)
    for p in (0.0, 0.4, 1.0):
        assert gradcheck(lambda x, p=p: ops.dropout(x, p, seed), (gate,))
        assert gradgradcheck(lambda x, p=p: ops.dropout(x, p, seed), (gate,))


def second_order_cases() -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    many, mlp = MultiLora("dense", torch.float32, True), Mlp("dense", torch.float32)
    z, scale, up = (leaf(*s, dtype=torch.float32, seed=2) for s in ((3, 5), (5,), (3, 5)))
    leaves = inputs(torch.float32, "dense", torch.float32, None)
    x, w, a, b = (leaves[name] for name in ("x", "weight", "lora_a", "lora_b"))
    seed = torch.tensor(3)
    return {
        "lora_linear": (
            lambda: ops.lora_linear(x, w, None, None, None, 0, None, a, b, SCALING, 0.3, seed, None)[0],
            [x, a],
        ),
        "multi_lora_linear": (lambda: many.call()[0], [many.x, many.a[1]]),
        "gated_mlp": (lambda: mlp.call()[0], [mlp.x, mlp.a[0]]),
        "gated_activation": (lambda: ops.gated_activation(z, up, "silu"), [z, up]),
        "dora_scale": (lambda: ops.dora_scale(z, scale, None), [z, scale]),
        "bottleneck": (lambda: pk.bottleneck(x, a, a.t(), activation="silu"), [x, a]),
    }  # fmt: skip


@pytest.mark.parametrize("upstream", ["differentiable", "constant"])
@pytest.mark.parametrize("op", second_order_cases())
def test_double_backward_is_refused(backend: str, op: str, upstream: str) -> None:
    """An error, never a gradient with a missing part."""
    call, (first, second) = second_order_cases()[op]
    y = call()
    loss = y.pow(2).sum() if upstream == "differentiable" else (y * torch.ones_like(y)).sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    sentence = f"{op}: a gradient of its gradients was asked for, expected first order only"
    with pytest.raises(RuntimeError, match=sentence):
        torch.autograd.grad(gradient.pow(2).sum(), second, retain_graph=True)
    with pytest.raises(RuntimeError, match=sentence):
        gradient.sum().backward()


def test_create_graph_alone_changes_no_gradient(backend: str) -> None:
    for op, (run, wanted) in second_order_cases().items():
        got = torch.autograd.grad(run().sum(), wanted, create_graph=True)
        want = torch.autograd.grad(run().sum(), wanted)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), op
