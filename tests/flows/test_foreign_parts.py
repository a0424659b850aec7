"""Layers of other libraries next to fused ones: the patched model gives the same values, and the report lists
what is not fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from flow_checks import (
    Calls,
    assert_fused,
    assert_near,
    fused_blocks,
    fused_layers,
    language_loss,
    step,
)
from flow_models import adapted, config, ids, llama, patched_copy
from peft_models import gradients
from rounding import ONE_MODEL, ONE_STEP
from torch import Tensor, nn

import peft_kernels as pk

PREFIX = "base_model.model.model.layers.0.mlp"


class RoundedLinear(nn.Linear):
    """Like layers for quantisation-aware training: a subclass with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().amax() / 7
        return nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias) + 0.25


def rounded_linear(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = RoundedLinear
    return linear


def mlps(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.base_model.model.model.layers]


def assert_as_stock(model: Any, stock: Any, bound: float = ONE_MODEL) -> None:
    """Loss and all gradients of a step, and the logits in evaluation."""
    got, want = (step(each.train(), lambda m: language_loss(m, ids())) for each in (model, stock))
    assert_near(got, want, bound)
    with torch.no_grad():
        answers = [{"logits": each.eval()(input_ids=ids(2)).logits} for each in (model, stock)]
    assert_near(*answers, bound)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("is_adapted", [True, False], ids=["adapted", "not-adapted"])
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_subclass_of_linear_in_an_mlp(part: str, is_adapted: bool, moment: str) -> None:
    """Present at patching, or swapped in later."""

    def make() -> Any:
        names = [n for n in ("q_proj", "gate_proj", "up_proj", "down_proj") if is_adapted or n != part]
        return adapted(llama(num_hidden_layers=1), target_modules=names)

    def swap(model: Any) -> None:
        layer = mlps(model)[0].get_submodule(part)
        rounded_linear(layer.base_layer if is_adapted else layer)

    stock, model = make(), make()
    swap(stock)
    if moment == "before":
        swap(model)
    report = pk.patch(model)
    if moment == "after":
        step(model, lambda m: language_loss(m, ids(3)))
        swap(model)
    with Calls() as calls:
        assert_as_stock(model, stock)
    assert calls.counts["gated_mlp"] == 0 and calls.counts["lora_linear"] > 0, calls.counts
    assert "RoundedLinear" in str(report)
    if moment == "before":
        assert PREFIX not in fused_blocks(report)
        assert f"{PREFIX}.{part}" not in fused_layers(report)


def test_subclass_of_linear_without_overrides() -> None:
    class Renamed(nn.Linear):
        pass

    model = adapted(llama(num_hidden_layers=1))
    stock = adapted(llama(num_hidden_layers=1))
    for name in ("gate_proj", "up_proj", "down_proj"):
        mlps(model)[0].get_submodule(name).base_layer.__class__ = Renamed
    report = pk.patch(model)
    assert_as_stock(model, stock)
    assert_fused(model, report, blocks=1)


class LoudLora(peft.tuners.lora.Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.q_proj"])
def test_lora_layer_with_its_own_forward(part: str, moment: str) -> None:
    stock, model = (adapted(llama(num_hidden_layers=1)) for _ in range(2))

    def find(model: Any) -> Any:
        return model.base_model.model.model.layers[0].get_submodule(part)

    find(stock).__class__ = LoudLora
    if moment == "before":
        find(model).__class__ = LoudLora
    report = pk.patch(model)
    if moment == "after":
        find(model).__class__ = LoudLora
    with Calls() as calls:
        assert_as_stock(model, stock)
    assert calls.fused > 0
    if moment == "before":
        assert f"base_model.model.model.layers.0.{part}" not in fused_layers(report)
        assert "LoudLora" in str(report)


OTHER_TUNERS: dict[str, Callable[[], Any]] = {
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["up_proj", "q_proj"], init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["up_proj", "q_proj"], init_weights=False),
    "oft": lambda: peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=["up_proj", "q_proj"], init_weights=False
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuner", OTHER_TUNERS)
def test_a_mixed_model(tuner: str) -> None:
    """LoRA on gate and down, another tuner on up."""

    def make() -> Any:
        torch.manual_seed(3)
        model = peft.get_peft_model(
            llama(num_hidden_layers=1),
            config(target_modules=["gate_proj", "down_proj", "k_proj"]),
            mixed=True,
        )
        torch.manual_seed(4)
        model.add_adapter("other", OTHER_TUNERS[tuner]())
        model.set_adapter(["default", "other"])
        return model

    stock, model = make(), make()
    report = pk.patch(model)
    with Calls() as calls:
        assert_as_stock(model, stock, ONE_STEP)
    assert calls.counts["gated_mlp"] == 0 and calls.counts["lora_linear"] > 0, calls.counts
    assert not any(name.endswith("mlp") for name in fused_blocks(report))


class Packed(nn.Module):
    """Like GPTQ, AWQ and HQQ: a separate class without `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight * 64).round().to(torch.int8))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 64)


@pytest.mark.parametrize("names", [["up_proj"], ["gate_proj", "up_proj", "down_proj"]], ids=["one", "all"])
@pytest.mark.parametrize("is_adapted", [True, False], ids=["adapted", "not-adapted"])
def test_a_base_without_a_weight(is_adapted: bool, names: list[str]) -> None:
    def make() -> Any:
        targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        model = adapted(
            llama(num_hidden_layers=1), target_modules=[n for n in targets if is_adapted or n not in names]
        )
        for name in names:
            mlp = mlps(model)[0]
            layer = mlp.get_submodule(name)
            if is_adapted:
                layer.base_layer = Packed(layer.base_layer)
            else:
                setattr(mlp, name, Packed(layer))
        return model

    stock, model = make(), make()
    report = pk.patch(model)
    assert_as_stock(model, stock)
    assert fused_layers(report) and not fused_blocks(report)
    if is_adapted:
        assert "Packed" in str(report)


def test_adalora_on_an_mlp() -> None:
    def make() -> Any:
        torch.manual_seed(3)
        settings = peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["gate_proj", "up_proj", "down_proj"]
        )
        model = peft.get_peft_model(llama(num_hidden_layers=1), settings)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.1)
        return model

    stock, model = make(), make()
    report = pk.patch(model)
    assert_as_stock(model, stock)
    assert not fused_blocks(report) and "original" in str(report)


def doubled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: 2 * original(*args, **kwargs)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("part", ["mlp", "mlp.up_proj", "self_attn.q_proj", "mlp.up_proj.base_layer"])
def test_forward_set_on_the_instance(part: str, moment: str) -> None:
    """As Liger does. The report no longer counts the layer as fused."""
    stock, model = (adapted(llama(num_hidden_layers=1)) for _ in range(2))

    def overwrite(model: Any) -> None:
        layer = model.base_model.model.model.layers[0].get_submodule(part)
        layer.forward = doubled(layer.forward)

    overwrite(stock)
    if moment == "before":
        overwrite(model)
    report = pk.patch(model)
    if moment == "after":
        overwrite(model)
    assert_as_stock(model, stock)
    if moment == "before":  # the new forward then calls the fused one
        assert f"base_model.model.model.layers.0.{part}" not in fused_layers(report) | fused_blocks(report)
        assert "forward" in str(report), str(report)


def test_forward_that_replaces_the_fused_one() -> None:
    """It does not call the old one: the layers inside stay fused, the MLP does not."""
    stock, model = (adapted(llama(num_hidden_layers=1)) for _ in range(2))
    report = pk.patch(model)
    for each in (stock, model):
        mlp = mlps(each)[0]
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(nn.functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with Calls() as calls:
        assert_as_stock(model, stock)
    assert calls.counts["gated_mlp"] == 0 and calls.counts["lora_linear"] > 0
    assert PREFIX not in fused_blocks(report), str(report)
    assert gradients(model)


def gpt2() -> Any:
    """Conv1D stores its weight transposed."""
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.2))


def falcon() -> Any:
    """FalconLinear is a subclass of nn.Linear with its own forward."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, initializer_range=0.2))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("make", [gpt2, falcon])
def test_plain_layers_of_other_classes(make: Callable[[], Any], base: str, adapter: str) -> None:
    torch.manual_seed(0)
    model = make()
    if base == "nf4":
        pk.quantize_model(model)
        packed = [name for name, p in model.named_parameters() if isinstance(p, pk.NF4Weight)]
        assert len(packed) == 4, packed
    stock = adapted(model, use_dora=adapter == "dora").eval()
    model, report = patched_copy(stock)
    with Calls() as calls:
        got, want = (step(each, lambda m: language_loss(m, ids())) for each in (model, stock))
    assert_near(got, want)
    assert calls.fused > 0 or calls.counts["dora_norm"] > 0, calls.counts
    assert_fused(model, report)
    merged = model.merge_and_unload()
    with torch.no_grad():
        answers = [{"logits": each(input_ids=ids(2)).logits} for each in (merged, stock)]
    assert_near(*answers)
