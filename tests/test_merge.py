"""Merging adapters into the base: what comes out computes what the unmerged model did."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from peft_models import DTYPES, lora
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.integrations.peft import merge_and_unload
from peft_kernels.nn import NF4Linear

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias"),
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
    pytest.mark.filterwarnings("ignore:.*lready.*merged"),
]

# Alphas give scalings other than 1: a scaling that is left out has to show.
OPTIONS: dict[str, list[dict[str, Any]]] = {  # of each active adapter
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
# The two libraries round a few of the double-quantised scales differently.
SAME_4_BITS = 5e-3

PATCHED = pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
SAFE = pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
OPTION = pytest.mark.parametrize("option", OPTIONS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
    """With a gradient: bitsandbytes' evaluation without one would repack the weight, and round its scales."""
    return testing.tensor(33, 64, dtype=dtype).requires_grad_()


def base_output(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(x)


def layers(model: Any) -> dict[str, Any]:
    return {name: getattr(model.base_model.model, name) for name in ("q", "o")}


def dense(weight: Tensor) -> Tensor:
    """Any weight as fp32."""
    if hasattr(weight, "quant_state"):
        weight = pk.NF4Weight.from_bnb(weight)
    return (weight.dequantize(torch.float32) if isinstance(weight, pk.NF4Weight) else weight.float()).detach()


def quantised(weight: Tensor) -> Tensor:
    return pk.NF4Weight.quantize(weight).dequantize(torch.float32)


@torch.no_grad()
def by_hand(model: Any, rounded: Callable[[Tensor], Tensor] = lambda weight: weight) -> nn.Module:
    """The merged model in fp32 from the formulas, with `rounded` after every adapter."""
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


def assert_merged(merged: nn.Module, expected: Any, dtype: torch.dtype, bnb: bool) -> None:
    eps = torch.finfo(dtype).eps
    for name in ("q", "o"):
        layer, wanted = getattr(merged, name), getattr(expected, name)
        assert not hasattr(layer, "lora_A")
        limit = SAME_4_BITS + 8 * eps if bnb else 1e-6 + 4 * eps
        assert testing.relative_error(dense(layer.weight), wanted.weight) < limit, name
        if wanted.bias is not None:
            assert layer.bias.dtype == dtype
            assert testing.relative_error(layer.bias, wanted.bias) < 2 * eps, name


# Right adapters, rightly merged.


@PATCHED
@SAFE
@OPTION
@DTYPE
@pytest.mark.parametrize("base", models.BASES)
def test_the_merged_model_computes_what_the_adapted_one_did(
    base: str, dtype: torch.dtype, option: str, safe: bool, patched: bool
) -> None:
    model, x = adapted(base, dtype, option, patched), inputs(dtype)
    y, alone, bnb = model(x), base_output(model, x), base == "bnb"
    exact = by_hand(model)
    expected = by_hand(model, quantised) if bnb else exact
    merged = merge_and_unload(model, safe_merge=safe)
    assert_merged(merged, expected, dtype, bnb)
    got, eps = merged(x), torch.finfo(dtype).eps
    if bnb:
        # Nothing but what 4 bits cannot hold, and less than a lost adapter.
        assert testing.relative_error(got, expected(x.float())) < SAME_4_BITS + 8 * eps
        assert testing.relative_error(got, y) < 0.5 * testing.relative_error(alone, y)
    else:
        limit = 1e-5 if dtype == torch.float32 else 8 * eps
        assert testing.relative_error(got, y) < limit < testing.relative_error(alone, y) / 4
        assert type(merged.q) is nn.Linear and merged.q.weight.dtype == dtype
    assert not any(p.requires_grad for n, p in merged.named_parameters() if "head" not in n)


@PATCHED
@OPTION
@pytest.mark.parametrize("base", models.BASES)
def test_merge_then_unmerge(base: str, option: str, patched: bool) -> None:
    """PEFT's own, under our forward."""
    if base == "bnb" and "bias" in option:
        pytest.skip("PEFT's own merging of these two")
    model, x = adapted(base, option=option, patched=patched), inputs()
    y, alone = model(x), base_output(model, x)
    expected = by_hand(model, quantised)
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model).values() if hasattr(layer, "lora_A"))
    if base == "bnb":
        assert testing.relative_error(model(x), expected(x)) < SAME_4_BITS
    else:
        assert testing.relative_error(model(x), y) < 1e-5
    model.unmerge_adapter()
    limit = 0.5 * testing.relative_error(alone, y) if base == "bnb" else 1e-5
    assert testing.relative_error(model(x), y) < limit
    assert testing.relative_error(base_output(model, x), y) > 0.1 / 3


@PATCHED
@SAFE
@OPTION
@DTYPE
def test_merging_back_into_nf4(dtype: torch.dtype, option: str, safe: bool, patched: bool) -> None:
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
def test_layers_that_are_merged_already_stay_as_they_are(base: str) -> None:
    model, x = adapted(base, option="two"), inputs()
    expected = by_hand(model, quantised if base == "bnb" else lambda weight: weight)
    model.merge_adapter(["default"])
    weight = dense(model.base_model.model.q.base_layer.weight)
    merged = merge_and_unload(model, safe_merge=True)
    assert torch.equal(dense(merged.q.weight), weight), "nothing was left to merge"
    assert testing.relative_error(merged(x), expected(x)) < (SAME_4_BITS if base == "bnb" else 1e-5)


def test_a_layer_without_an_active_adapter_is_left_alone() -> None:
    model = adapted("bnb", option="two")
    model.set_adapter("second")
    weight = model.base_model.model.q.base_layer.weight
    assert merge_and_unload(model, safe_merge=True).q.weight is weight


def test_merging_one_of_two_adapters() -> None:
    model, x = adapted(option="two"), inputs()
    model.set_adapter("second")
    y = model(x)
    merged = model.merge_and_unload(adapter_names=["second"])
    assert testing.relative_error(merged(x), y) < 1e-6


@pytest.mark.parametrize("double_quant", [True, False], ids=["double-quant", "single"])
@PATCHED
@SAFE
def test_merging_after_bitsandbytes_own_evaluation(safe: bool, patched: bool, double_quant: bool) -> None:
    """On a CPU with AVX512-BF16 that rearranges the weight, in place."""
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
    assert testing.relative_error(merged(x), expected(x)) < 0.02, "its scales were rounded to bf16"


def test_a_merge_that_gets_biases_right_is_not_corrected_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert testing.relative_error(merge_and_unload(model).q.bias, expected) < 1e-6


def test_what_we_merge_first_is_not_reported_as_merged_already() -> None:
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


# Broken adapters: nothing is merged.


def spoil(key: str, value: float) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.base_model.model.get_parameter(key).view(-1)[-1] = value

    return change


def overflow(model: Any) -> None:
    """Finite adapters, whose product is beyond fp16."""
    with torch.no_grad():
        model.base_model.model.o.lora_A.default.weight.fill_(300.0)
        model.base_model.model.o.lora_B.default.weight.fill_(300.0)


def zero_row(model: Any) -> None:
    """Nothing to scale to a magnitude: 0 / 0."""
    with torch.no_grad():
        layer = model.base_model.model.o
        layer.lora_B.default.weight[0] = 0
        weight = dense(layer.base_layer.weight)
        weight[0] = 0
        layer.base_layer.weight.data = weight


# The spoilt layer is the last one, if there is a choice: a merge that checks as it goes has merged the other.
NAN, INF = float("nan"), float("inf")
BROKEN: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "lora_A": (
        "plain",
        spoil("o.lora_A.default.weight", NAN),
        r"model\.o\.lora_A\.default\.weight: .* finite",
    ),
    "lora_B": (
        "plain",
        spoil("o.lora_B.default.weight", INF),
        r"model\.o\.lora_B\.default\.weight: .* finite",
    ),
    "second": ("two", spoil("o.lora_B.second.weight", NAN), r"model\.o\.lora_B\.second\.weight: .* finite"),
    "bias": ("lora-bias", spoil("q.lora_B.default.bias", INF), r"model\.q\.lora_B\.default\.bias: .* finite"),
    "base-bias": (
        "two-biases",
        spoil("q.base_layer.bias", NAN),
        r"model\.q\.bias: .* merging default, second",
    ),
    "magnitude": (
        "dora",
        spoil("o.lora_magnitude_vector.default.weight", NAN),
        r"model\.o\.lora_magnitude_vector\.default\.weight: .* finite",
    ),
    "overflow": ("plain", overflow, r"model\.o\.weight: expected finite values after merging default"),
}


def assert_refused(model: Any, error: type[Exception], message: str, **options: bool) -> None:
    before = copy.deepcopy(model.state_dict())
    types = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=f"{message}.*nothing is merged"):
        merge_and_unload(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value.nan_to_num(), after[key].nan_to_num()), key
    assert types == {name: type(module) for name, module in model.named_modules()}
    assert not any(layer.merged for layer in layers(model).values() if hasattr(layer, "lora_A"))


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "quantize"])
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("base", models.BASES)
def test_safe_merge_of_a_broken_adapter_changes_nothing(base: str, case: str, quantize: bool) -> None:
    option, spoil_it, message = BROKEN[case]
    model = adapted(base, torch.float16, option)
    spoil_it(model)
    assert_refused(model, ValueError, message, safe_merge=True, quantize=quantize)


def test_safe_merge_sees_what_dora_divides_by() -> None:
    model = adapted("dense", option="dora", patched=False)
    zero_row(model)
    assert_refused(model, ValueError, r"model\.o\.weight: expected finite", safe_merge=True)


def test_merging_a_broken_adapter_back_into_nf4_changes_nothing() -> None:
    model = adapted()
    spoil("o.lora_A.default.weight", INF)(model)
    message = r"model\.o\.lora_A\.default\.weight: expected finite values, got NaN or Inf"
    assert_refused(model, ValueError, message, quantize=True)


def test_an_adapter_that_is_not_merged_may_be_broken() -> None:
    model = adapted(option="two")
    spoil("o.lora_A.second.weight", NAN)(model)
    model.set_adapter("default")
    y = model(inputs())
    merged = merge_and_unload(model, safe_merge=True)
    assert testing.relative_error(merged(inputs()), y) < 1e-5


@SAFE
@pytest.mark.parametrize("base", models.BASES)
def test_a_bias_has_to_have_somewhere_to_go(base: str, safe: bool) -> None:
    model = lora(models.base_model(base), lora_bias=True)  # q has a bias, o has none
    assert_refused(model, RuntimeError, r"model\.o: impossible to merge adapter default", safe_merge=safe)


@pytest.mark.parametrize("base", models.BASES)
def test_an_adapter_that_is_active_twice_raises(base: str) -> None:
    model = adapted(base, option="two", patched=False)
    model.base_model.set_adapter(["second", "default", "second"])
    with pytest.raises(ValueError, match="expected each name once, got second, default, second"):
        merge_and_unload(model)
    assert not any(layer.merged for layer in layers(model).values())
