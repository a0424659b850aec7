"""Hooks on patched layers, and inside them, still run."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from peft_models import lora
from rounding import ONE_MODEL
from torch import nn

import peft_kernels as pk
import testing

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_inside_a_layer_still_run(part: str) -> None:
    model, x, calls = lora(models.base_model("nf4")), testing.tensor(3, 64), []
    report = pk.patch(model)
    model.base_model.model.q.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]
    assert any("hooks on a" in key for layer in report.layers for key in layer.fallbacks)


def test_hooks_on_a_layer_still_run() -> None:
    model, x, calls = lora(models.base_model("nf4")), testing.tensor(3, 64), []
    report = pk.patch(model)
    model.base_model.model.q.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1] and not any(layer.fallbacks for layer in report.layers)


def test_a_hook_is_named_by_its_module() -> None:
    base = models.tiny_llama(num_hidden_layers=1)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    report, layer = pk.patch(model), base.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp.up_proj, layer.self_attn.v_proj.lora_A.default):
        module.register_forward_hook(lambda *_: None)
    model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    told = "hooks on a {}, which a fused forward would skip; remove them to fuse it"
    found = {entry.name.rpartition(".")[2]: [*entry.fallbacks] for entry in report.entries if entry.fallbacks}
    assert found["0"] == [f"input_layernorm: {told.format('LlamaRMSNorm')}"]
    assert found["mlp"] == [f"up_proj: {told.format('Linear')}"]
    assert found["v_proj"] == [told.format("Linear")]


def test_what_is_not_fused_has_a_line_and_its_article() -> None:
    class Layer(type(models.tiny_llama().model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Norm(type(models.tiny_llama().model.norm)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x)

    base = models.tiny_llama()
    base.model.layers[0].__class__, base.model.norm.__class__ = Layer, Norm
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    base.model.layers[1].self_attn.q_proj.lora_dropout["default"] = nn.AlphaDropout(0.1)
    text = str(pk.patch(model))
    assert "decoder layer (1 of 2)" in text and "norm (1 of 5)" in text
    assert (
        "a subclass of LlamaDecoderLayer with a forward of its own; nothing to do: base_model.model.model"
        in text
    )
    assert "lora_dropout is an AlphaDropout" in text
    text = str(pk.patch(base.model.embed_tokens))
    assert text.startswith("peft_kernels: no LoRA or 4-bit layers\nnothing to patch: ")


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
    assert report.layers[0].fallbacks == {
        "an accelerate hook inside that offloads weights; keep the weights on the device": 1
    }
