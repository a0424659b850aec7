"""Hooks on patched layers, and inside them, still run."""

from __future__ import annotations

import models
import pytest
import torch
from peft_models import lora
from rounding import ONE_MODEL

import peft_kernels as pk
import testing


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_inside_a_layer_still_run(part: str) -> None:
    model, x, calls = lora(models.base_model("nf4")), testing.tensor(3, 64), []
    report = pk.patch(model)
    model.base_model.model.q.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]
    assert any("hooks on the base layer" in key for layer in report.layers for key in layer.fallbacks)


def test_hooks_on_a_layer_still_run() -> None:
    model, x, calls = lora(models.base_model("nf4")), testing.tensor(3, 64), []
    report = pk.patch(model)
    model.base_model.model.q.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1] and not any(layer.fallbacks for layer in report.layers)


def test_accelerate_hooks_on_a_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, x = lora(models.base_model("nf4")), testing.tensor(3, 64)
    plain, layer = model(x), model.base_model.model.q
    for first in ("hook", "patch"):
        if first == "hook":
            hooks.add_hook_to_module(layer, hooks.ModelHook())
        report = pk.patch(model)
        if first == "patch":
            hooks.add_hook_to_module(layer, hooks.ModelHook())
        assert not report.original, "it is fused, under the hook"
        assert testing.relative_error(model(x), plain) < ONE_MODEL and not torch.equal(model(x), plain)
        assert pk.unpatch(model) == 2
        assert torch.equal(model(x), plain)
        hooks.remove_hook_from_module(layer)
        assert torch.equal(model(x), plain)

    with pk.patched(model):
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooks.remove_hook_from_module(layer)
    assert torch.equal(model(x), plain) and pk.unpatch(model) == 0


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_accelerate_hooks_inside_a_layer(part: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, x = lora(models.base_model("dense")), testing.tensor(3, 64)
    plain, inside = model(x), model.base_model.model.q.get_submodule(part)
    report = pk.patch(model)
    hooks.add_hook_to_module(inside, hooks.AlignDevicesHook("cpu"))
    assert testing.relative_error(model(x), plain) < ONE_MODEL
    assert not report.original and not report.layers[0].fallbacks, "x is there already: nothing to move"
    hooks.add_hook_to_module(inside, hooks.AlignDevicesHook("cpu", offload=True))
    assert testing.relative_error(model(x), plain) < ONE_MODEL
    assert report.layers[0].fallbacks == {"an accelerate hook inside that offloads weights": 1}
