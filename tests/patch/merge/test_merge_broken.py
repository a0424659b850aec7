"""If one adapter cannot be merged, nothing is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from merge_models import SAFE, adapted, dense, inputs, layers
from peft_models import lora
from rounding import ONE_MODEL

import testing
from peft_kernels.integrations.peft import merge_and_unload

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias"),
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
    pytest.mark.filterwarnings("ignore:.*lready.*merged"),
]


def spoil(key: str, value: float) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.base_model.model.get_parameter(key).view(-1)[-1] = value

    return change


def overflow(model: Any) -> None:
    """Finite adapters whose delta overflows fp16."""
    with torch.no_grad():
        model.base_model.model.o.lora_A.default.weight.fill_(300.0)
        model.base_model.model.o.lora_B.default.weight.fill_(300.0)


def zero_row(model: Any) -> None:
    """A zero row has no direction: 0 / 0."""
    with torch.no_grad():
        layer = model.base_model.model.o
        layer.lora_B.default.weight[0] = 0
        weight = dense(layer.base_layer.weight)
        weight[0] = 0
        layer.base_layer.weight.data = weight


# The last layer is broken: a merge that checks layer by layer would already have merged the first.
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


def test_safe_merge_checks_the_divisor_of_dora() -> None:
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
    assert testing.relative_error(merged(inputs()), y) < ONE_MODEL


@SAFE
@pytest.mark.parametrize("base", models.BASES)
def test_lora_bias_needs_a_base_bias(base: str, safe: bool) -> None:
    model = lora(models.base_model(base), lora_bias=True)  # q has a bias, o does not
    assert_refused(model, RuntimeError, r"model\.o: impossible to merge adapter default", safe_merge=safe)


@pytest.mark.parametrize("base", models.BASES)
def test_an_adapter_that_is_active_twice_raises(base: str) -> None:
    model = adapted(base, option="two", patched=False)
    model.base_model.set_adapter(["second", "default", "second"])
    with pytest.raises(ValueError, match="expected each name once, got second, default, second"):
        merge_and_unload(model)
    assert not any(layer.merged for layer in layers(model).values())
