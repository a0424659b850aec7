"""Host cost of calls of back end cuda: launches, and torch functions called for memory and views."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from skips import require
from stub_device import stub_device, torch_ops

import peft_kernels as pk
import ptx_backend as ptx
from bench.lib import layers

COUNTS = {
    "nf4_linear": (1, 3),
    "lora_linear": (3, 7),
    "patched PEFT layer": (3, 7),
    "forward + backward of it": (8, 19),
}


def calls() -> dict[str, Callable[[], Any]]:
    """With one row."""
    weights = layers.Weights(2048, 2048, torch.bfloat16)
    bases = layers.nf4_linears(weights, 1)
    (layer,) = layers.peft_loras(bases, weights, patch=True)
    x, dy = (tensor.view(1, 1, 2048) for tensor in (weights.x(1), weights.dy(1)))
    a, b = layers.adapters(layer)
    weight: Any = bases[0].weight
    op = partial(pk.lora_linear, weight=weight, lora_a=a, lora_b=b, scaling=layers.SCALING)
    functions = partial(pk.nf4_linear, weight=weight), op, layer
    forwards = [layers.forward_call(function, x) for function in functions]
    backward = layers.training_call(layer, x.clone().requires_grad_(), dy)
    return dict(zip(COUNTS, (*forwards, backward), strict=True))


def test_counts() -> None:
    pytest.importorskip("peft")
    require("ptx")
    found = {}
    made = calls()
    with stub_device() as launches:
        for name, call in made.items():
            call()
            launches()
            call()
            found[name] = len(launches()), sum(torch_ops(call).values())
    assert found == COUNTS


@pytest.mark.parametrize("n,k", [(4096, 4096), (4096, 14336)])
def test_launches_at_2048_rows(n: int, k: int) -> None:
    """Of a layer with LoRA, including torch's GEMM with the single piece of the weight."""
    require("ptx")
    weight = pk.NF4Weight.quantize(torch.ones(n, k, dtype=torch.bfloat16))
    a, b = (torch.ones(*shape, requires_grad=True) for shape in ((16, k), (n, 16)))
    x = torch.ones(2048, k, dtype=torch.bfloat16, requires_grad=True)
    with stub_device() as launches:
        y = pk.lora_linear(x, weight, a, b, 2.0)
        forward = len(launches())
        torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
        backward = len(launches())
    extension = ptx.BACKEND.extension
    assert extension.piece_of(n, k, 2) >= n and extension.piece_of(k, n, 2) >= k
    assert (1 + forward, 1 + backward) == (4, 6)
