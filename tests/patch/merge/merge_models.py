"""Models with adapters to merge, and the expected merged models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from installed import before
from peft_models import lora
from torch import Tensor, nn

import peft_kernels as pk
import testing

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# Alphas give scalings other than 1, so that an omitted scaling shows.
OPTIONS: dict[str, list[dict[str, Any]]] = {  # for each active adapter
    "plain": [{}],
    "rslora": [{"use_rslora": True}],
    "dora": [{"use_dora": True}],
    "lora-bias": [{"lora_bias": True, "target_modules": ["q"]}],
    "two": [{}, {"r": 4, "target_modules": ["o"]}],
    "two-biases": [
        {"lora_bias": True, "target_modules": ["q"]},
        {"lora_bias": True, "target_modules": ["q"], "r": 4, "lora_alpha": 3},
    ],
}

PATCHED = pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
SAFE = pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
OPTION = pytest.mark.parametrize("option", OPTIONS)


def adapted(
    base: str | nn.Module = "nf4",
    dtype: torch.dtype = torch.float32,
    option: str = "plain",
    patched: bool = True,
) -> Any:
    first, *more = OPTIONS[option]
    model = lora(models.base_model(base, dtype) if isinstance(base, str) else base, **first)
    for name, options in zip(("second",), more, strict=False):
        defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q", "o"], "init_lora_weights": False}
        model.add_adapter(name, peft.LoraConfig(**defaults | options))
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data = testing.tensor(*parameter.shape, seed=len(key), scale=0.1)
        model.base_model.set_adapter(["default", name])
    if patched:
        pk.patch(model)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """With a gradient: without one bitsandbytes repacks the weight in evaluation and rounds its scales."""
    return testing.tensor(33, 64, dtype=dtype).requires_grad_()


def base_output(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(x)


def layers(model: Any) -> dict[str, Any]:
    return {name: getattr(model.base_model.model, name) for name in ("q", "o")}


def dense(weight: Tensor) -> Tensor:
    """A weight of any kind in fp32."""
    if hasattr(weight, "quant_state"):
        weight = pk.NF4Weight.from_bnb(weight)
    return (weight.dequantize(torch.float32) if isinstance(weight, pk.NF4Weight) else weight.float()).detach()


def quantised(weight: Tensor) -> Tensor:
    double_quant = not before("bitsandbytes", "0.50")  # as models.to_linear4bit
    return pk.NF4Weight.quantize(weight, double_quant=double_quant).dequantize(torch.float32)


@torch.no_grad()
def by_hand(model: Any, rounded: Callable[[Tensor], Tensor] = lambda weight: weight) -> nn.Module:
    """The merged model in fp32, from the formulas, with `rounded` applied after every adapter."""
    net = models.Net()
    net.lm_head.load_state_dict(model.base_model.model.lm_head.state_dict())
    for name, layer in layers(model).items():
        base = getattr(layer, "base_layer", layer)
        weight = unmerged = dense(base.weight)
        bias = None if base.bias is None else base.bias.float()
        for adapter in getattr(layer, "active_adapters", []):
            if adapter not in layer.lora_A:
                continue
            a, b, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
            delta = scaling * b.weight.float() @ a.weight.float()
            weight = weight + delta
            if adapter in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[adapter].weight.float()
                weight = weight * (magnitude / (unmerged + delta).norm(dim=1))[:, None]
            weight = rounded(weight)
            if b.bias is not None:
                bias = bias + scaling * b.bias.float()
        getattr(net, name).weight.copy_(weight)
        if bias is not None:
            getattr(net, name).bias.copy_(bias)
    return net


def same_4_bits(rounded_to: torch.dtype) -> float:
    """The most that weights in 4 bits, or a product, differ if they were rounded before: a value that crosses
    a threshold moves by a gap of codes, 0.3 of the RMS value, and 3 eps of them cross. That is 0.5 sqrt(eps),
    here doubled, and ten more of 8,192 values: sums in other orders, and a few 8-bit scales, which
    bitsandbytes looks up in bins."""
    return torch.finfo(rounded_to).eps ** 0.5 + 0.01


def assert_merged(merged: nn.Module, expected: Any, dtype: torch.dtype, bnb: bool) -> None:
    eps = torch.finfo(dtype).eps
    for name in ("q", "o"):
        layer, wanted = getattr(merged, name), getattr(expected, name)
        assert not hasattr(layer, "lora_A")
        limit = same_4_bits(dtype) if bnb else 1e-6 + 4 * eps
        assert testing.relative_error(dense(layer.weight), wanted.weight) < limit, name
        if wanted.bias is not None:
            assert layer.bias.dtype == dtype
            assert testing.relative_error(layer.bias, wanted.bias) < 2 * eps, name
