"""Merging adapters on experts' weights, and adapters other than LoRA, back into NF4."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from merge_models import SAFE
from peft_experts import (
    adapt,
    experts_of,
    fill,
    lora_config,
    mixture,
    peft,
    skip_second_adapter,
    tokens,
    weights_of,
)

import peft_kernels as pk
import testing
from peft_kernels.integrations.peft import merge_and_unload
from peft_kernels.nf4.experts_packing import NF4Experts

FAMILY = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])


def packed_as(merged: Any, wide: Any) -> None:
    """Checks that the weights of `merged` are those of the dense model `wide`, in 4 bits."""
    for name, weight in weights_of(merged).items():
        assert isinstance(weight, pk.NF4Weight) and not weight.is_dense, name
        dense = dict(wide.named_parameters())[name].detach()
        dense = dense.mT if wide.experts.is_transposed else dense
        expected = pk.NF4Weight.quantize(dense)
        for part, value in expected._state.packed_form().items():
            assert torch.equal(weight._state.packed_form()[part], value), (name, part)


@FAMILY
@SAFE
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_merged_experts_are_packed_again(family: str, safe: bool, patched: bool) -> None:
    model = adapt(mixture("nf4", family))
    wide, alone = copy.deepcopy(model).merge_and_unload(), mixture("nf4", family)
    before = sum(weight.nbytes for weight in weights_of(model).values())
    if patched:
        pk.patch(model)
    merged: Any = merge_and_unload(model, quantize=True, safe_merge=safe)
    assert isinstance(merged.experts, NF4Experts)
    assert sum(weight.nbytes for weight in weights_of(merged).values()) == before
    packed_as(merged, wide)
    expected = wide(tokens())
    lost = testing.relative_error(alone(tokens()), expected)
    # Two products with 4-bit errors: about half of what the adapter does. packed_as compares every bit.
    assert testing.relative_error(merged(tokens()), expected) < 0.75 * lost


@SAFE
def test_a_weight_without_an_adapter_keeps_its_4_bits(safe: bool) -> None:
    model = adapt(mixture("nf4"), target_parameters=["experts.down_proj"])
    up = experts_of(model).gate_up_proj
    before = copy.deepcopy(up._state.packed_form())
    merged: Any = merge_and_unload(model, quantize=True, safe_merge=safe)
    assert merged.experts.gate_up_proj is up and not merged.experts.down_proj.is_dense
    assert all(torch.equal(up._state.packed_form()[part], value) for part, value in before.items())


def test_two_adapters_on_experts_are_packed_once() -> None:
    """Packing after the first adapter would add the second to a rounded weight."""
    skip_second_adapter()
    model = adapt(mixture("nf4"))
    model.add_adapter("second", lora_config(mixture("nf4"), r=2))
    fill(model, "second")
    model.base_model.set_adapter(["default", "second"])
    wide = copy.deepcopy(model).merge_and_unload()
    packed_as(merge_and_unload(model, quantize=True), wide)


@FAMILY
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_safe_merge_of_experts_equals_stock_peft(base: str, family: str) -> None:
    model = adapt(mixture(base, family))
    expected = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    merged = merge_and_unload(model, safe_merge=True)
    for name, weight in weights_of(expected).items():
        assert torch.equal(weights_of(merged)[name], weight)


@pytest.mark.parametrize("quantize", [False, True])
def test_nothing_is_merged_if_experts_overflow(quantize: bool) -> None:
    """Finite adapters whose sum with the weight overflows fp16, in the weight checked last."""
    model = adapt(mixture("nf4", dtype=torch.float16))
    outer = model.base_model.model.experts
    with torch.no_grad():
        for part in (outer.base_layer.lora_A, outer.base_layer.lora_B):
            part["default"].weight.fill_(300.0)
    name = outer.base_layer.parameter_name
    with pytest.raises(
        ValueError, match=rf"experts\.base_layer\.{name}: expected finite values after merging"
    ):
        merge_and_unload(model, quantize=quantize, safe_merge=True)
    assert not any(weight.is_dense for weight in weights_of(model).values())
    assert not outer.merged and not outer.base_layer.merged
    assert "merge" not in vars(outer)


def test_nan_on_experts_raises_before_packing() -> None:
    model = adapt(mixture("nf4"))
    inner = model.base_model.model.experts.base_layer
    with torch.no_grad():
        inner.lora_B["default"].weight[-1, -1] = float("nan")
    with pytest.raises(ValueError, match=r"base_layer\.lora_B\.default\.weight: expected finite"):
        merge_and_unload(model, quantize=True)
    assert not any(weight.is_dense for weight in weights_of(model).values())


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig"])
def test_other_methods_are_packed_again_too(method: str) -> None:
    config = getattr(peft, method)(r=4, alpha=8, target_modules=["q", "o"], init_weights=False)
    model = peft.get_peft_model(models.base_model("nf4"), config)
    wide = copy.deepcopy(model).merge_and_unload()
    merged = merge_and_unload(model, quantize=True)
    for name in ("q", "o"):
        weight: Any = getattr(merged, name).weight
        assert isinstance(weight, pk.NF4Weight) and not weight.is_dense
        assert torch.equal(weight.packed, pk.NF4Weight.quantize(getattr(wide, name).weight).packed)
