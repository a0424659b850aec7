"""FlopCounterMode counts the public calls like the same layers in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fresh_process import Python
from op_samples import NAMESPACES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
import testing
from peft_kernels import AdaptedLinear, Adapter, BottleneckParameters
from peft_kernels.core import flops, registry

N, K, R, M = 24, 40, 4, 6


def counted(call: Callable[[], Any], backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        y = call()
        if backward:
            sum(t.sum() for t in (y if isinstance(y, list) else [y])).backward()
    return int(counter.get_total_flops())


def pair(k: int, n: int) -> tuple[Tensor, Tensor]:
    return testing.tensor(R, k).requires_grad_(), testing.tensor(n, R).requires_grad_()


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, a), b)


def cases(base: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    x = testing.tensor(2, M // 2, K).requires_grad_()
    weights: list[Any] = [testing.nf4_weight(*s, 32) for s in ((N, K), (N, K), (K, N))]
    dense = [w.dequantize(torch.float32) for w in weights]
    if base == "dense":
        weights = dense
    (a, b), (c, d) = pair(K, N), pair(N, K)
    gate = AdaptedLinear(weights[0], None, [Adapter(a, b, 1.0)])
    up, down = AdaptedLinear(weights[1]), AdaptedLinear(weights[2], None, [Adapter(c, d, 1.0)])
    found = {
        "lora_linear": (lambda: pk.lora_linear(x, weights[0], a, b, 1.0), lambda: lora(x, dense[0], a, b)),
        "multi_lora_linear": (
            lambda: pk.multi_lora_linear(x, [gate, up]),
            lambda: [lora(x, dense[0], a, b), F.linear(x, dense[1])],
        ),
        "gated_mlp": (
            lambda: pk.gated_mlp(x, gate, up, down),
            lambda: lora(F.silu(lora(x, dense[0], a, b)) * F.linear(x, dense[1]), dense[2], c, d),
        ),
    }
    e, f = pair(K, K)
    found["bottleneck"] = (lambda: pk.bottleneck(x, e, f), lambda: x + F.linear(F.relu(F.linear(x, e)), f))
    of_rows = BottleneckParameters(e, f), torch.zeros(M, dtype=torch.int64)
    found["multi_bottleneck"] = (
        lambda: pk.multi_bottleneck(x, [of_rows[0]], of_rows[1]),
        found["bottleneck"][1],
    )
    if base == "nf4":
        found["nf4_linear"] = (lambda: pk.nf4_linear(x, weights[0]), lambda: F.linear(x, dense[0]))
    return found


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_counts_equal_plain_torch(backend: str, base: str) -> None:
    for name, (call, plain) in cases(base).items():
        assert counted(call) == counted(plain) > 0, name
        assert counted(call, backward=True) == counted(plain, backward=True), name


def test_only_needed_gradients_count(backend: str) -> None:
    weight, (a, b), x = testing.nf4_weight(N, K, 32), pair(K, N), testing.tensor(M, K)
    a.requires_grad_(False)
    both = counted(lambda: pk.lora_linear(x, weight, a, b, 1.0), backward=True)
    assert both - counted(lambda: pk.lora_linear(x, weight, a, b, 1.0)) == 2 * M * N * R


def test_attention(backend: str) -> None:
    """Every score counts, as in torch; backward recomputes them."""
    shapes = (2, M, 4, R), (2, K, 2, R), (2, K, 2, R)
    q, k, v = (testing.tensor(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    product = 2 * 2 * 4 * M * K * R
    assert counted(lambda: pk.attention(q, k, v, is_causal=True)) == 2 * product
    assert counted(lambda: pk.attention(q, k, v, is_causal=True), backward=True) == (2 + 5) * product


def test_dora(backend: str) -> None:
    """DoRA counts as LoRA plus the norms; dropout adds a base GEMM."""
    weight, (a, b), x, magnitude = (
        testing.nf4_weight(N, K, 32),
        pair(K, N),
        testing.tensor(M, K),
        torch.ones(N),
    )
    norm, layer = 2 * R * (N * K + R * K + N * R), 2 * M * (N * K + R * K + N * R)
    dora: Any = pk.dora_linear
    assert counted(lambda: dora(x, weight, a, b, magnitude, 1.0)) == layer + norm
    assert counted(lambda: dora(x, weight, a, b, magnitude, 1.0, None, 0.5)) == layer + norm + 2 * M * N * K


def test_every_namespace_is_counted() -> None:
    flops.update_counters()
    known: Any = torch.utils.flop_counter.flop_registry
    others = ("gated_mlp", "dora_norm", "attention", "attention_backward")
    gemm_ops = [name for name in registry.OPS if "linear" in name or "bottleneck" in name or name in others]
    for namespace in NAMESPACES.values():
        ops = getattr(torch.ops, namespace)
        assert [name for name in registry.OPS if getattr(ops, name) in known] == gemm_ops


@pytest.mark.parametrize("first", ["peft_kernels", "torch.utils.flop_counter"])
def test_import_order(python: Python, first: str) -> None:
    """The package never imports the counter, which imports Triton."""
    script = f"""
import sys, torch
import {first}
assert "torch.utils.flop_counter" in sys.modules or "triton" not in sys.modules
import peft_kernels as pk
assert ("torch.utils.flop_counter" in sys.modules) is ({first!r} != "peft_kernels")
weight = pk.NF4Weight.quantize(torch.randn(8, 64))
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    pk.nf4_linear(torch.ones(3, 64), weight)
assert counter.get_total_flops() == 2 * 3 * 8 * 64, counter.get_total_flops()
"""
    python(script)
