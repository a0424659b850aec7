"""The call cache: every change between two calls takes effect."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from peft_models import add_adapter, lora
from rounding import ONE_MODEL
from test_blocks import Mlp, adapted
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import fused
from peft_kernels.patch.block import gated_mlp
from peft_kernels.patch.lora import forward as lora_forward


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(2 * parameter.detach())


def hook(part: str) -> Callable[[Any], Any]:
    return lambda layer: layer.get_submodule(part).register_forward_hook(lambda m, args, y: 3 * y)


def pre_hook(layer: Any) -> None:
    layer.base_layer.register_forward_pre_hook(lambda m, args: (3 * args[0],))


def own_forward(part: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        found = layer.get_submodule(part)
        forward = found.forward
        found.forward = lambda x: 3 * forward(x)

    return change


def write(layer: Any) -> None:
    with torch.no_grad():
        layer.base_layer.weight += 0.5


def in_place(layer: Any) -> None:
    layer.active_adapter.append("other")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling": lambda layer: layer.scale_layer(3.0),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "another adapter": lambda layer: layer.set_adapter("other"),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "one more, in place": in_place,
    "A": lambda layer: setattr(layer.lora_A.default, "weight", doubled(layer.lora_A.default.weight)),
    "B": lambda layer: setattr(layer.lora_B.default, "weight", doubled(layer.lora_B.default.weight)),
    "A's layer": lambda layer: layer.lora_A.update({"default": nn.Linear(64, 8, bias=False)}),
    "bias": lambda layer: setattr(layer.base_layer, "bias", doubled(layer.base_layer.bias)),
    "base": lambda layer: setattr(layer, "base_layer", nn.Linear(64, 128)),
    "class of the base": lambda layer: setattr(layer.base_layer, "__class__", Doubling),
    "weight, in place": write,
    "hook on the base": hook("base_layer"),
    "hook before the base": pre_hook,
    "hook on A": hook("lora_A.default"),
    "hook on B": hook("lora_B.default"),
    "hook on the dropout": hook("lora_dropout.default"),
    "forward of the base": own_forward("base_layer"),
    "forward of B": own_forward("lora_B.default"),
    "dtype of the adapter": lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
}


SAME_NUMBERS = [CHANGES["merged"], CHANGES["dtype of the adapter"]]


def layer_of(base: str) -> tuple[Any, Any, Tensor]:
    """A patched model, a layer of it that has been called, and the input."""
    model = lora(models.base_model(base), lora_dropout=0.5)
    add_adapter(model, "other")
    model.eval()
    pk.patch(model)
    layer, x = model.base_model.model.q, models.inputs(3)
    with torch.no_grad():
        layer(x)
    assert fused.record_of(layer).cached is not None
    return model, layer, x


def check_change(model: Any, module: Any, x: Tensor, change: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        before = module(x)
        change(module)
        got = module(x)
        pk.unpatch(model)
        want = module(x)
    assert testing.relative_error(before, want) > 1e-3 or change in SAME_NUMBERS
    assert testing.relative_error(got, want) < ONE_MODEL


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_change_between_two_calls_is_seen(base: str, change: str) -> None:
    check_change(*layer_of(base), CHANGES[change])


@pytest.fixture
def refuse_preparing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes preparing a call an error after the returned function is called."""

    def refuse(*_: Any) -> None:
        raise AssertionError("prepared again")

    def start() -> None:
        monkeypatch.setattr(lora_forward, "_prepare", refuse)
        monkeypatch.setattr(gated_mlp, "_prepare_and_run", refuse)

    return start


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_second_call_is_not_prepared_again(base: str, refuse_preparing: Callable[[], None]) -> None:
    _model, layer, x = layer_of(base)
    expected = layer(x)
    refuse_preparing()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[:1]), layer(x[None, :1])[0])  # any number of rows
    with pytest.raises(AssertionError, match="prepared again"):
        layer(x.bfloat16())


def test_temporary_tensors_are_not_cached() -> None:
    """The sum of the base's and the adapter's bias is recomputed."""
    model = lora(models.base_model("nf4"), lora_bias=True).eval()
    pk.patch(model)
    layer, x = model.base_model.model.q, models.inputs(3)
    with torch.no_grad():
        layer.lora_B.default.bias.fill_(1.0)
        before = layer(x)
        layer.lora_B.default.bias.fill_(2.0)
        assert (
            testing.relative_error(layer(x) - before, torch.full_like(before, 2.0)) < ONE_MODEL
        )  # scaling is 2


def test_forward_replaced_for_all_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, x = layer_of("dense")
    forward = nn.Linear.forward
    replaced: Any = lambda self, x: 3 * forward(self, x)  # noqa: E731
    check_change(model, layer, x, lambda _: monkeypatch.setattr(nn.Linear, "forward", replaced))


def test_gradients_of_a_repeated_call() -> None:
    _model, layer, x = layer_of("nf4")
    x.requires_grad_()
    wanted = [x, layer.lora_A.default.weight, layer.lora_B.default.weight]
    got = torch.autograd.grad(layer(x).square().sum(), wanted)
    fused.record_of(layer).cached = None
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    assert all(map(torch.equal, got, expected))


def test_dropout_is_drawn_in_each_call() -> None:
    _model, layer, x = layer_of("nf4")
    layer.train()
    assert not torch.equal(layer(x), layer(x)) and fused.record_of(layer).cached is None


def test_autocast_after_a_call_without() -> None:
    _model, layer, x = layer_of("dense")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_copies_and_freed_layers() -> None:
    _model, layer, x = layer_of("nf4")
    twin = copy.deepcopy(layer)
    assert fused.record_of(twin).cached is None
    twin.scale_layer(3.0)
    assert testing.relative_error(twin(x), layer(x)) > 1e-3
    gone = [weakref.ref(twin), weakref.ref(twin.base_layer)]
    gc.disable()
    try:
        del twin
        assert [one() for one in gone] == [None, None]  # the cache does not keep the layer alive
    finally:
        gc.enable()


MLP_CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling": lambda mlp: mlp.down_proj.scale_layer(3.0),
    "projection": lambda mlp: setattr(mlp, "up_proj", nn.Linear(64, 128, bias=False)),
    "activation": lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
    "hook on the activation": hook("act_fn"),
    "hook on a projection": hook("gate_proj"),
    "hook inside": hook("up_proj.lora_A.default"),
    "disabled": lambda mlp: mlp.gate_proj.enable_adapters(False),
}


@pytest.mark.parametrize("change", MLP_CHANGES)
def test_a_change_in_an_mlp_is_seen(change: str, refuse_preparing: Callable[[], None]) -> None:
    model = adapted(Mlp(), "nf4").eval()
    pk.patch(model)
    mlp, x = model.base_model.model[0], models.inputs(3)
    with torch.no_grad():
        expected = mlp(x)
        assert fused.record_of(mlp).cached is not None and torch.equal(mlp(x), expected)
    check_change(model, mlp, x, MLP_CHANGES[change])
