"""Merging adapters into the base: the merged model gives the values of the adapted one."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import models
import pytest
import torch
from merge_models import (
    OPTION,
    OPTIONS,
    PATCHED,
    SAFE,
    adapted,
    assert_merged,
    base_output,
    by_hand,
    dense,
    inputs,
    layers,
    quantised,
    same_4_bits,
)
from numbers_policy import pairs
from peft_models import DTYPES
from rounding import ONE_LAYER, ONE_MODEL
from torch import nn

import peft_kernels as pk
import testing
from peft_kernels.integrations.peft import merge_and_unload
from peft_kernels.nn import NF4Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias"),
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
    pytest.mark.filterwarnings("ignore:.*lready.*merged"),
]


MODELS = tuple(itertools.product(models.BASES, OPTIONS))
FLAGS = {"safe": (False, True), "patched": (True, False)}


@pairs(model=MODELS, dtype=DTYPES, **FLAGS)
def test_merged_equals_adapted(model: Any, dtype: torch.dtype, safe: bool, patched: bool) -> None:
    base, option = model
    model, x = adapted(base, dtype, option, patched), inputs(dtype)
    y, alone, bnb = model(x), base_output(model, x), base == "bnb"
    exact = by_hand(model)
    expected = by_hand(model, quantised) if bnb else exact
    merged = merge_and_unload(model, safe_merge=safe)
    assert_merged(merged, expected, dtype, bnb)
    got, eps = merged(x), torch.finfo(dtype).eps
    if bnb:
        # At most the 4-bit error, and less than a lost adapter.
        assert testing.relative_error(got, expected(x.float())) < same_4_bits(dtype)
        assert testing.relative_error(got, y) < 0.5 * testing.relative_error(alone, y)
    else:
        limit = ONE_MODEL if dtype == torch.float32 else 8 * eps
        assert testing.relative_error(got, y) < limit < testing.relative_error(alone, y) / 4
        assert type(merged.q) is nn.Linear and merged.q.weight.dtype == dtype
    assert not any(p.requires_grad for n, p in merged.named_parameters() if "head" not in n)


@PATCHED
@OPTION
@pytest.mark.parametrize("base", models.BASES)
def test_merge_then_unmerge(base: str, option: str, patched: bool) -> None:
    """PEFT's own merge, on patched layers."""
    if base == "bnb" and "bias" in option:
        pytest.skip("PEFT's own merging of these two")
    model, x = adapted(base, option=option, patched=patched), inputs()
    y, alone = model(x), base_output(model, x)
    expected = by_hand(model, quantised)
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model).values() if hasattr(layer, "lora_A"))
    if base == "bnb":
        assert testing.relative_error(model(x), expected(x)) < same_4_bits(torch.float32)
    else:
        assert testing.relative_error(model(x), y) < ONE_MODEL
    model.unmerge_adapter()
    limit = 0.5 * testing.relative_error(alone, y) if base == "bnb" else ONE_MODEL
    assert testing.relative_error(model(x), y) < limit
    assert testing.relative_error(base_output(model, x), y) > 0.1 / 3


@pairs(option=tuple(OPTIONS), dtype=DTYPES, **FLAGS)
def test_merging_back_into_nf4(option: str, dtype: torch.dtype, safe: bool, patched: bool) -> None:
    model, x = adapted("nf4", dtype, option, patched), inputs(dtype)
    y, alone = model(x), base_output(model, x)
    wide = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    merged = merge_and_unload(model, quantize=True, safe_merge=safe)
    for name, options in {"q": OPTIONS[option][:1], "o": OPTIONS[option]}.items():
        layer = getattr(merged, name)
        assert type(layer) is NF4Linear and not layer.weight.is_dense
        if any(name in adapter.get("target_modules", [name]) for adapter in options):
            expected = pk.NF4Weight.quantize(getattr(wide, name).weight)
            assert torch.equal(layer.weight.packed, expected.packed)
            assert torch.equal(layer.weight.absmax, expected.absmax)
    assert torch.equal(merged.q.bias, wide.q.bias)
    error, lost = testing.relative_error(merged(x), y), testing.relative_error(alone, y)
    assert error < 0.5 * lost, (error, lost)


@pytest.mark.parametrize("base", models.BASES)
def test_merged_layers_are_unchanged(base: str) -> None:
    model, x = adapted(base, option="two"), inputs()
    expected = by_hand(model, quantised if base == "bnb" else lambda weight: weight)
    model.merge_adapter(["default"])
    weight = dense(model.base_model.model.q.base_layer.weight)
    merged = merge_and_unload(model, safe_merge=True)
    assert torch.equal(dense(merged.q.weight), weight), "nothing was left to merge"
    limit = same_4_bits(torch.float32) if base == "bnb" else ONE_MODEL
    assert testing.relative_error(merged(x), expected(x)) < limit


def test_layer_without_an_active_adapter_is_unchanged() -> None:
    model = adapted("bnb", option="two")
    model.set_adapter("second")
    weight = model.base_model.model.q.base_layer.weight
    assert merge_and_unload(model, safe_merge=True).q.weight is weight


def test_merging_one_of_two_adapters() -> None:
    model, x = adapted(option="two"), inputs()
    model.set_adapter("second")
    y = model(x)
    merged = model.merge_and_unload(adapter_names=["second"])
    assert testing.relative_error(merged(x), y) < ONE_LAYER


@pytest.mark.parametrize("double_quant", [True, False], ids=["double-quant", "single"])
@PATCHED
@SAFE
def test_merging_after_bitsandbytes_own_evaluation(safe: bool, patched: bool, double_quant: bool) -> None:
    """On a CPU with AVX512-BF16 this rearranges the weight in place, and rounds its scales to bf16."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = models.base_model("bnb")
    if not double_quant:
        for name, layer in {"q": base.q, "o": base.o}.items():
            flat = bnb.nn.Params4bit(dense(layer.weight), compress_statistics=False, quant_type="nf4")
            getattr(base, name).weight = flat.to("cpu")
    model, x = adapted(base, patched=False), inputs()
    expected = by_hand(model, quantised)
    with torch.no_grad():
        model.eval()(x.detach())
    if not getattr(model.base_model.model.q.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack on this machine")
    if patched:
        pk.patch(model)
    merged = merge_and_unload(model, safe_merge=safe).train()
    assert testing.relative_error(merged(x), expected(x)) < same_4_bits(torch.bfloat16)


def test_correct_bias_merge_is_not_corrected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft.tuners.lora import Linear4bit

    model = adapted("bnb", option="two-biases")
    original = Linear4bit.merge

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        bias = self.base_layer.bias.data.clone()
        for name in [name for name in self.active_adapters if name not in self.merged_adapters]:
            bias += self.scaling[name] * self.lora_B[name].bias.data
        original(self, *args, **kwargs)
        self.base_layer.bias.data = bias

    monkeypatch.setattr(Linear4bit, "merge", merge)
    expected = by_hand(model).q.bias
    assert testing.relative_error(merge_and_unload(model).q.bias, expected) < ONE_LAYER


def test_layers_merged_by_this_call_are_not_reported_as_merged_before() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "All adapters are already merged")
        merge_and_unload(adapted(), quantize=True)
        merge_and_unload(adapted("bnb", option="lora-bias"))


def test_a_merged_bitsandbytes_layer_stays_patched() -> None:
    merged = merge_and_unload(adapted("bnb"))
    assert pk.unpatch(merged) == 2


def test_quantising_a_merged_model_again() -> None:
    merged = adapted(dtype=torch.bfloat16).merge_and_unload()
    pk.quantize_model(merged)
    assert type(merged.q) is NF4Linear and isinstance(merged.q.weight, pk.NF4Weight)
