"""torch.func's transforms and forward-mode differentiation of the public calls.

Under them the plain-torch reference of ops runs, whichever back end is used otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import BF16_STEP, ONE_MODEL
from skips import require
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import peft_kernels as pk
import testing
from peft_kernels import AdaptedLinear, Adapter

N, K, R, SCALING = 24, 40, 4, 0.8
CALLS = (
    "nf4_linear",
    "lora_linear",
    "dense",
    "compute_dtype",
    "dora_linear",
    "multi_lora_linear",
    "gated_mlp",
)
Function = Callable[..., Tensor]


def case(name: str) -> tuple[Function, Function, list[Tensor]]:
    """A call as a function of x and adapters, its definition in plain torch, and its inputs."""
    gate, up, down = (
        testing.nf4_weight(n, k, 32, seed=s) for s, (n, k) in enumerate([(N, K), (N, K), (K, N)])
    )
    bias = testing.tensor(N, seed=5)
    x = testing.tensor(6, K, seed=1)

    def pair(seed: int, k: int = K, n: int = N) -> list[Tensor]:
        return [
            testing.tensor(R, k, seed=seed, scale=k**-0.5),
            testing.tensor(n, R, seed=seed + 1, scale=0.5),
        ]

    def dense(weight: Any, like: Tensor) -> Tensor:
        return weight.dequantize(torch.float32).to(like.dtype)

    def lora(x: Tensor, weight: Any, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, dense(weight, x), bias) + SCALING * (x @ a.t()) @ b.t()

    if name == "nf4_linear":
        return (
            lambda x: pk.nf4_linear(x, gate, bias),
            lambda x: F.linear(x, dense(gate, x), bias.to(x.dtype)),
            [x],
        )
    if name in ("lora_linear", "dense", "compute_dtype"):
        weight: Any = gate if name != "dense" else gate.dequantize(torch.float32)
        compute = torch.bfloat16 if name == "compute_dtype" else None
        return (
            lambda x, a, b: pk.lora_linear(x, weight, a, b, SCALING, bias, compute_dtype=compute),
            lambda x, a, b: lora(x, gate, a, b, bias),
            [x, *pair(2)],
        )
    if name == "dora_linear":
        magnitude = testing.tensor(N, seed=9).abs() + 0.5

        def dora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            norm = (dense(gate, x) + SCALING * b.detach() @ a.detach()).norm(dim=1)  # a constant, as in PEFT
            return magnitude.to(x.dtype) / norm * lora(x, gate, a, b) + bias.to(x.dtype)

        return (lambda x, a, b: pk.dora_linear(x, gate, a, b, magnitude, SCALING, bias), dora, [x, *pair(2)])
    if name == "multi_lora_linear":
        return (
            lambda x, a, b, c, d: torch.cat(
                pk.multi_lora_linear(
                    x,
                    [
                        AdaptedLinear(gate, bias, [Adapter(a, b, SCALING)]),
                        AdaptedLinear(up, None, [Adapter(c, d, SCALING)]),
                    ],
                ),
                -1,
            ),
            lambda x, a, b, c, d: torch.cat([lora(x, gate, a, b, bias), lora(x, up, c, d)], -1),
            [x, *pair(2), *pair(12)],
        )
    assert name == "gated_mlp"
    return (
        lambda x, a, b, c, d: pk.gated_mlp(
            x,
            AdaptedLinear(gate, bias, [Adapter(a, b, SCALING)]),
            AdaptedLinear(up),
            AdaptedLinear(down, None, [Adapter(c, d, SCALING)]),
        ),
        lambda x, a, b, c, d: lora(F.silu(lora(x, gate, a, b, bias)) * F.linear(x, dense(up, x)), down, c, d),
        [x, *pair(2), *pair(12, N, K)],
    )


def assert_near(got: Any, truth: Any, name: str) -> None:
    bound = BF16_STEP if name == "compute_dtype" else ONE_MODEL  # there the base GEMM is in bf16
    for g, t in zip(got, truth, strict=True):
        assert g.dtype == torch.float32
        assert testing.relative_error(g, t) <= bound


@pytest.mark.parametrize("name", CALLS)
def test_grad(name: str) -> None:
    call, definition, inputs = case(name)
    every = tuple(range(len(inputs)))
    got = grad(lambda *t: call(*t).sin().sum(), every)(*inputs)
    truth = grad(lambda *t: definition(*t).sin().sum(), every)(*(t.double() for t in inputs))
    assert_near(got, truth, name)


@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_x(name: str, in_dim: int) -> None:
    call, definition, (x, *rest) = case(name)
    batch = torch.stack([x, 2 * x, x.flip(0)], in_dim)
    got = vmap(lambda x: call(x, *rest), in_dim)(batch)
    truth = [definition(t.double(), *(r.double() for r in rest)) for t in batch.unbind(in_dim)]
    assert_near([got], [torch.stack(truth)], name)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_per_sample(name: str) -> None:
    call, definition, (x, *rest) = case(name)
    batch, every = torch.stack([x, 2 * x, x.flip(0)]), tuple(range(1 + len(rest)))
    dims = (0, *(None for _ in rest))
    got = vmap(grad(lambda *t: call(*t).sin().sum(), every), dims)(batch, *rest)
    wide = [r.double() for r in rest]
    truth = [grad(lambda *t: definition(*t).sin().sum(), every)(t.double(), *wide) for t in batch]
    assert_near(got, [torch.stack(column) for column in zip(*truth, strict=True)], name)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode(name: str) -> None:
    """Tangents are right, and never dropped."""
    call, definition, inputs = case(name)
    tangents = [testing.tensor(*t.shape, seed=30 + i) for i, t in enumerate(inputs)]
    y, got = jvp(call, tuple(inputs), tuple(tangents))
    truth = jvp(definition, tuple(t.double() for t in inputs), tuple(t.double() for t in tangents))
    assert_near([y, got], truth, name)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        assert_near([torch.autograd.forward_ad.unpack_dual(call(*duals)).tangent], truth[1:], name)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_every_forced_back_end(name: str) -> None:
    require(name)
    with pk.use_backend(name):
        for call in CALLS:
            test_grad(call)


def test_dropout_under_vmap() -> None:
    """torch's rule for random functions: `randomness` selects a mask per sample or one for all."""
    weight = testing.nf4_weight(N, K, 32)
    a, b = torch.eye(K), torch.ones(N, K)
    x = torch.ones(3, 6, K)

    def masks(randomness: str) -> Tensor:
        call = vmap(lambda x: pk.lora_linear(x, weight, a, b, 1.0, dropout_p=0.5), randomness=randomness)
        return call(x) - pk.nf4_linear(x, weight)

    different, same = masks("different"), masks("same")
    assert not torch.allclose(different[0], different[1], atol=1e-3)
    assert torch.allclose(same[0], same[1], atol=1e-3)
    with pytest.raises(RuntimeError, match="random"):
        masks("error")


def test_a_module() -> None:
    layer = pk.nn.NF4LoRALinear(torch.nn.Linear(K, N), r=R)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    x = testing.tensor(6, K)
    got = grad(lambda p: functional_call(layer, p, (x,)).sin().sum())(trained)
    layer(x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert testing.relative_error(got[name], parameter.grad) <= ONE_MODEL, name
