"""Ops define their own compute dtypes: autocast changes no bit of them, forward or backward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from op_samples import CASES, samples
from test_gradient_regimes import Case, assert_same, each_case, namespace  # noqa: F401
from torch.utils._pytree import tree_leaves

import peft_kernels as pk
import testing
from peft_kernels import AdaptedLinear, Adapter
from peft_kernels.core import registry

N, K, R = 48, 96, 8


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def check_outputs(call: Any, op: str, sample: str) -> None:
    def outcome() -> list[torch.Tensor]:
        """Results, and the arguments, which the op may change in place."""
        args = samples(op)[sample]
        return [t for t in tree_leaves((call(*args), args)) if isinstance(t, torch.Tensor)]

    want = outcome()
    with autocast():
        got = outcome()
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


each_sample = pytest.mark.parametrize("op,sample", CASES, ids=["-".join(c) for c in CASES])


@each_sample
def test_outputs(namespace: str, op: str, sample: str) -> None:  # noqa: F811
    check_outputs(getattr(getattr(torch.ops, namespace), op).default, op, sample)


@each_sample
def test_outputs_of_eager_calls(op: str, sample: str) -> None:
    check_outputs(registry.eager(getattr(torch.ops.peft_kernels, op).default), op, sample)


@each_sample
def test_compiled_kernels(compiled_ops: Any, op: str, sample: str) -> None:
    """Called below the dispatcher's autocast keys, as from C++: torch functions inside an op must not change
    their dtype under autocast."""
    overload = getattr(compiled_ops, op).default
    if not torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU"):
        assert registry.OPS[op].composite
        pytest.skip("made of other ops: it has no kernel")
    kernel = functools.partial(overload._op_dk, torch._C.DispatchKey.CPU)
    with torch.no_grad():
        check_outputs(kernel, op, sample)


@each_case
def test_gradients(op: str, sample: str) -> None:
    case = Case(op, sample)
    want = case.gradients(case(*case.leaves))
    with autocast():
        got = case.gradients(case(*case.leaves))
    assert_same(got, want)


def calls(base: str) -> dict[str, Any]:
    x = testing.tensor(9, K)

    def layer(n: int, k: int, seed: int) -> AdaptedLinear:
        weight: Any = testing.nf4_weight(n, k, seed=seed)
        if base == "dense":
            weight = weight.dequantize(torch.float32)
        elif base == "merged":
            weight.add_(0.0)
        a, b = testing.tensor(R, k, seed=seed), testing.tensor(n, R, seed=seed + 1)
        return AdaptedLinear(weight, testing.tensor(n, seed=seed), [Adapter(a, b, 0.5)])

    gate, up, down = layer(N, K, 1), layer(N, K, 2), layer(K, N, 3)
    one = gate.adapters[0]
    found = {
        "lora_linear": lambda: pk.lora_linear(x, gate.weight, one.lora_a, one.lora_b, 0.5, gate.bias),
        "dora_linear": lambda: pk.dora_linear(
            x, gate.weight, one.lora_a, one.lora_b, torch.ones(N), 0.5, gate.bias
        ),
        "dora_linear-dropout": lambda: pk.dora_linear(
            x, gate.weight, one.lora_a, one.lora_b, torch.ones(N), 0.5, gate.bias, 0.3
        ),
        "multi_lora_linear": lambda: pk.multi_lora_linear(x, [gate, up])[1],
        "gated_mlp": lambda: pk.gated_mlp(x, gate, up, down),
    }
    if base != "dense":
        found["nf4_linear"] = lambda: pk.nf4_linear(x, gate.weight, gate.bias)
    return found


@pytest.mark.parametrize("base", ["nf4", "dense", "merged"])
def test_public_calls(backend: str, base: str) -> None:
    for name, call in calls(base).items():
        torch.manual_seed(0)
        want = call()
        torch.manual_seed(0)
        with autocast():
            got = call()
        assert got.dtype == torch.float32 and torch.equal(got, want), name
