"""Tests for the layout on the Hugging Face Hub, which kernel-builder runs with `pytest -m kernels_ci`.

tools/hub_layout.py copies this file, so it needs nothing but the package, torch and pytest. Together they
take seconds: kernel-builder recommends less than a minute.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.kernels_ci
FORMATS = ("nf4", "fp4", "mxfp4", "nvfp4", "int4", "fp8")


def load() -> Any:
    """The built variant on the path, as `kernels` loads it; otherwise the installed package."""
    for folder in map(Path, sys.path):
        if (folder / "metadata.json").is_file() and (folder / "__init__.py").is_file():
            name = json.loads((folder / "metadata.json").read_text())["id"]
            spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
            assert spec is not None and spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return importlib.import_module("peft_kernels")


pk = load()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def compare(function: Callable[[], tuple[Tensor, ...]], error: float) -> None:
    """The CPU kernels against the reference in plain torch; errors are relative to the largest value."""
    with pk.use_backend("cpu"):
        found = function()
    with pk.use_backend("reference"):
        wanted = function()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=error * float(other.detach().abs().max()))


def test_the_kernels_are_compiled() -> None:
    assert "cpu        usable: C++" in pk.explain()


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def with_gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (y, *torch.autograd.grad(y.float().square().sum(), inputs))


ERRORS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", ERRORS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_linear(format: str, rows: int, dtype: torch.dtype) -> None:
    weight = pk.NF4Weight.quantize(torch.randn(96, 256), format=format)
    x = random(rows, 256, dtype=dtype)
    compare(lambda: with_gradients(pk.nf4_linear(x, weight), x), ERRORS[dtype])


@dtypes
@pytest.mark.parametrize("packed", [True, False], ids=["nf4", "dense"])
def test_lora_linear(packed: bool, dtype: torch.dtype) -> None:
    dense = torch.randn(96, 128).to(dtype)
    weight = pk.NF4Weight.quantize(dense) if packed else dense
    x, a, b = (random(*shape, dtype=dtype) for shape in ((37, 128), (8, 128), (96, 8)))
    compare(lambda: with_gradients(pk.lora_linear(x, weight, a, b, 0.5), x, a, b), ERRORS[dtype])


def test_dora_linear() -> None:
    weight = pk.NF4Weight.quantize(torch.randn(96, 128))
    x, a, b, m = (random(*shape) for shape in ((37, 128), (8, 128), (96, 8), (96,)))
    compare(lambda: with_gradients(pk.dora_linear(x, weight, a, b, m, 0.5), x, a, b, m), 1e-4)


def test_gated_mlp() -> None:
    def layer(out: int, into: int) -> Any:
        adapter = pk.Adapter(random(4, into, scale=0.1), random(out, 4, scale=0.1), 2.0)
        return pk.AdaptedLinear(pk.NF4Weight.quantize(torch.randn(out, into) * 0.1), adapters=[adapter])

    gate, up, down = layer(192, 64), layer(192, 64), layer(64, 192)
    x = random(9, 64)
    weights = [one for part in (gate, up, down) for one in (part.adapters[0].lora_a, part.adapters[0].lora_b)]
    compare(lambda: with_gradients(pk.gated_mlp(x, gate, up, down), x, *weights), 1e-4)


def test_experts() -> None:
    weight = pk.NF4Weight.quantize(torch.randn(3, 96, 64))
    ends = torch.tensor([5, 5, 17], dtype=torch.int32)
    x, a, b = (random(*shape) for shape in ((17, 64), (3, 4, 64), (3, 96, 4)))
    compare(lambda: with_gradients(pk.experts_lora_linear(x, ends, weight, a, b, 0.5), x, a, b), 1e-4)


def test_loss_without_logits() -> None:
    weight, x, labels = torch.randn(999, 64) * 0.1, random(37, 64), torch.randint(999, (37,))
    labels[3] = -100
    compare(lambda: with_gradients(pk.linear_cross_entropy(x, weight, labels), x), 1e-4)


def test_norm_and_rotary() -> None:
    x, weight = random(2, 9, 64), random(64)
    compare(lambda: with_gradients(pk.rms_norm(x, weight), x, weight), 1e-4)
    q, k = random(2, 9, 4, 32), random(2, 9, 2, 32)
    cos, sin = torch.rand(2, 9, 32), torch.rand(2, 9, 32)
    compare(lambda: pk.rotary(q, k, cos, sin), 1e-4)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_attention(is_causal: bool) -> None:
    q, k, v = random(2, 40, 4, 32), random(2, 40, 2, 32), random(2, 40, 2, 32)
    compare(lambda: with_gradients(pk.attention(q, k, v, is_causal=is_causal), q, k, v), 1e-4)


def test_bottleneck() -> None:
    x, down, up = random(37, 64), random(8, 64, scale=0.1), random(64, 8, scale=0.1)
    compare(lambda: with_gradients(pk.bottleneck(x, down, up), x, down, up), 1e-4)


def test_optimizer() -> None:
    start, gradients = torch.randn(4096), torch.randn(3, 4096)

    def steps() -> tuple[Tensor]:
        weight = start.clone().requires_grad_()
        optimizer = pk.optim.AdamW8bit([weight], lr=1e-2)
        for weight.grad in gradients:
            optimizer.step()
        return (weight.detach(),)

    compare(steps, 1e-6)
