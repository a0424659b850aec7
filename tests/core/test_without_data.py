"""The public calls with meta tensors, under FakeTensorMode and torch.export, and on two back ends at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from rounding import ONE_LAYER, relative_error
from skips import require
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
import testing
from peft_kernels import AdaptedLinear, Adapter

N, K, R = 24, 64, 4
CALLS = (
    "nf4_linear", "lora_linear", "dora_linear", "dora_linear-dropout", "multi_lora_linear", "gated_mlp",
    "gated_activation",
)  # fmt: skip


def layers(base: str) -> list[AdaptedLinear]:
    made = []
    for seed, (n, k) in enumerate([(N, K), (N, K), (K, N)]):
        weight: Any = testing.nf4_weight(n, k, 32, seed=seed)
        if base == "dense":
            weight = weight.dequantize(torch.float32)
        a, b = testing.tensor(R, k, seed=seed), testing.tensor(n, R, seed=seed)
        made.append(AdaptedLinear(weight, testing.tensor(n, seed=seed), [Adapter(a, b, 0.5, 0.1)]))
    return made


def moved(layer: AdaptedLinear, device: str) -> AdaptedLinear:
    one = layer.adapters[0]
    adapter = Adapter(one.lora_a.to(device), one.lora_b.to(device), one.scaling, one.dropout_p)
    assert layer.bias is not None
    return replace(layer, weight=layer.weight.to(device), bias=layer.bias.to(device), adapters=[adapter])


def call(name: str, x: Tensor, gate: AdaptedLinear, up: AdaptedLinear, down: AdaptedLinear) -> list[Tensor]:
    one = gate.adapters[0]
    rest = (gate.weight, one.lora_a, one.lora_b)
    if name == "nf4_linear":
        return [pk.nf4_linear(x, gate.weight, gate.bias)]
    if name == "lora_linear":
        return [pk.lora_linear(x, *rest, 0.5, gate.bias, 0.1)]
    if name.startswith("dora_linear"):
        magnitude, p = x.new_ones(N), 0.1 if name.endswith("dropout") else 0.0
        return [pk.dora_linear(x, *rest, magnitude, 0.5, gate.bias, p)]
    if name == "multi_lora_linear":
        return pk.multi_lora_linear(x, [gate, up])
    if name == "gated_mlp":
        return [pk.gated_mlp(x, gate, up, down)]
    return [pk.gated_activation(x, x, "silu")]


each_call = pytest.mark.parametrize(
    "name,base",
    [(name, base) for name in CALLS for base in ("nf4", "dense") if (name, base) != ("nf4_linear", "dense")],
)


def assert_alike(got: list[Tensor], want: list[Tensor], device: str) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype and g.stride() == w.stride()
        assert g.device.type == device


@each_call
def test_meta(name: str, base: str) -> None:
    given, x = layers(base), testing.tensor(2, 3, K)
    got = call(name, x.to("meta"), *(moved(layer, "meta") for layer in given))
    assert_alike(got, call(name, x, *given), "meta")


@each_call
def test_fake_tensors(name: str, base: str) -> None:
    given, x = layers(base), testing.tensor(2, 3, K)
    want = call(name, x, *given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = call(name, mode.from_tensor(x), *given)
    assert all(type(t).__name__ == "FakeTensor" for t in got)
    assert_alike(got, want, "cpu")


@each_call
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(name: str, base: str, strict: bool) -> None:
    if strict and torch.__version__ < (2, 10):
        pytest.skip("torch 2.9's strict export refuses tensors that a module does not own")
    given, x = layers(base), testing.tensor(2, 3, K)
    for layer in given:
        layer.adapters[0].dropout_p = 0.0

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return call(name, x, *given)

    program = torch.export.export(Module(), (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(t.startswith("peft_kernels.") for t in targets), targets
    torch.manual_seed(0)
    got = program.module()(x)
    torch.manual_seed(0)
    for g, w in zip(got, call(name, x, *given), strict=True):
        assert relative_error(g, w) <= ONE_LAYER


def test_two_threads_use_two_back_ends() -> None:
    """A forced back end applies to its own thread only."""
    require("cpu")
    together, x, weight = Barrier(2), testing.tensor(3, K), testing.nf4_weight(N, K)

    def run(backend: str) -> tuple[str | None, str]:
        with pk.use_backend(backend):
            together.wait()
            y = pk.nf4_linear(x.clone().requires_grad_(), weight)
            together.wait()
            return pk.dispatch.forced(), str(y.grad_fn)

    names = ("cpu", "reference")
    with ThreadPoolExecutor(2) as pool:
        for name, (forced, node) in zip(names, pool.map(run, names), strict=True):
            assert forced == name and f"peft_kernels_{name}_nf4_linear" in node
    assert pk.dispatch.forced() is None
