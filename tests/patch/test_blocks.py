"""Fusion across layers: the gated MLP, against unpatched PEFT."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from flow_checks import assert_near
from peft_models import DTYPES, REGIMES, add_adapter, assert_same_numbers, lora, run, step
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch.examine import examine

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Mlp(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, act_fn: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(64, 128, bias=bias)
        self.up_proj = nn.Linear(64, 128, bias=bias)
        self.down_proj = nn.Linear(128, 64, bias=bias)
        self.act_fn = act_fn or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Only(nn.Sequential):
    def forward(self, *args: Any) -> Any:
        return self[0](*args)


def adapted(
    module: nn.Module, base: str = "dense", dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data = testing.tensor(*parameter.shape, seed=parameter.numel() % 97, scale=0.15)
    model = models.to_base(Only(module).to(dtype), base)
    return lora(model, **{"target_modules": PROJECTIONS} | options)


BASES = pytest.mark.parametrize("base", models.BASES)
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"target_modules": ["gate_proj", "down_proj", "q_proj", "k_proj", "v_proj"]},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BASES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_gated_mlp(options: str, base: str, dtype: torch.dtype, op_counts: Counter[str]) -> None:
    model = adapted(Mlp(bias=True), base, dtype, **OPTIONS[options])
    report = assert_same_numbers(model, testing.tensor(2, 9, 64, dtype=dtype), 0.03)
    assert [block.kind for block in report.blocks] == ["gated MLP Mlp"]
    assert op_counts["gated_mlp"] == 1 and not op_counts["lora_linear"]


@pytest.mark.parametrize("regime", REGIMES)
@BASES
def test_gradients_under_every_regime(base: str, regime: str, op_counts: Counter[str]) -> None:
    model, x = adapted(Mlp(bias=True), base), testing.tensor(9, 64)
    pk.patch(model)
    want, got = run(model, x), run(model, x, REGIMES[regime](model))
    assert op_counts["gated_mlp"] == (3 if "reentrant" in regime else 2)
    assert got.keys() == want.keys() and len(want) == 8
    for name in want:
        assert torch.equal(got[name], want[name]), name


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_found_by_running_it(name: str) -> None:
    module = Mlp(ACTIVATIONS[name]())
    assert examine(adapted(module).base_model.model[0], "gated MLP").facts.activation == name
    assert_same_numbers(adapted(Mlp(ACTIVATIONS[name]())), testing.tensor(7, 64))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Swish(nn.Module):
    """SiLU, with a setting of the class and one of the instance."""

    beta = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize("setting", ["beta", "scale"])
def test_settings_of_the_activation_that_change_after_patching(setting: str, op_counts: Counter[str]) -> None:
    model, x = adapted(Mlp(Swish())), testing.tensor(7, 64)
    report = pk.patch(model)
    before = model(x)
    assert op_counts["gated_mlp"] == 1
    setattr(model.base_model.model[0].act_fn, setting, 3.0)
    got = run(model, x)
    assert op_counts["gated_mlp"] == 1
    assert report.blocks[0].fallbacks == {f"act_fn.{setting} was changed after patch(); patch again": 1}
    pk.unpatch(model)
    assert testing.relative_error(got["y"], before) > 0.1
    assert_near(got, run(model, x))


class Buffered(Swish):
    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.register_buffer("scale", torch.ones(()))


@pytest.mark.parametrize("make", [Buffered, lambda: nn.Sequential(nn.SiLU())], ids=["buffer", "children"])
def test_stateful_activation_is_not_fused(make: Callable[[], nn.Module]) -> None:
    assert not pk.patch(adapted(Mlp(make()))).blocks


class DroppingMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(hidden, 0.1, self.training))


class ModuleDroppingMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class ClampingMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x))


@pytest.mark.parametrize("make", [lambda: Mlp(Squared()), DroppingMlp, ModuleDroppingMlp, ClampingMlp])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mlp_with_another_forward_is_not_fused(make: Callable[[], nn.Module], training: bool) -> None:
    """Also in evaluation mode, where its dropout has no effect."""
    model = adapted(make()).train(training)
    x = testing.tensor(7, 64)
    plain = run(model, x)
    report = pk.patch(model)
    assert [block.fused for block in report.blocks] == [False] and "its forward is not" in str(report)
    assert_near(run(model, x), plain)


def test_unfused_block_runs_layer_by_layer(op_counts: Counter[str]) -> None:
    model = adapted(nn.Sequential(Mlp(), nn.Identity()), use_dora=True)
    plain = run(model, testing.tensor(7, 64))
    report = pk.patch(model)
    op_counts.clear()  # with an older PEFT a layer's forward has been tried
    got = run(model, testing.tensor(7, 64))
    assert op_counts["dora_norm"] == 3 and not op_counts["gated_mlp"]
    assert "gate_proj: DoRA or another variant" in str(report)
    assert_near(got, plain)


def test_disabled_and_merged_adapters() -> None:
    model, x = adapted(Mlp()), testing.tensor(7, 64)
    with model.disable_adapter():
        base = model(x)
    y = model(x)
    report = pk.patch(model)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.merge_adapter()
    assert testing.relative_error(model(x), y) < ONE_MODEL
    model.unmerge_adapter()
    assert testing.relative_error(model(x), y) < ONE_MODEL
    assert not any(block.fallbacks for block in report.blocks)


def test_several_adapters_and_mixed_batches() -> None:
    model = adapted(Mlp())
    add_adapter(model, "other", r=3, lora_alpha=5, target_modules=PROJECTIONS)
    x, names = testing.tensor(3, 5, 64), ["default", "other", "__base__"]
    mixed = model.eval()(x, adapter_names=names)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    pk.patch(model)
    assert testing.relative_error(model(x), both) < ONE_MODEL
    assert testing.relative_error(model(x, adapter_names=names), mixed) < ONE_MODEL
    model.set_adapter("other")
    assert testing.relative_error(model(x), both) > 1e-3


def test_copies_share_nothing() -> None:
    model, x = adapted(Mlp()), testing.tensor(3, 64)
    pk.patch(model)
    mlp = model.base_model.model[0]
    twin = copy.deepcopy(model).base_model.model[0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any() and mlp(x).any()


def test_llama_model_with_everything(op_counts: Counter[str]) -> None:
    model = lora(models.tiny_llama(), target_modules=PROJECTIONS)
    ids = torch.arange(24).view(2, 12)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    plain = step(model, loss)
    report = pk.patch(model, without=("qkv", "attention", "norms", "residuals", "loss"))
    got = step(model, loss)
    assert op_counts["gated_mlp"] == 2 and op_counts["lora_linear"] == 8
    assert "2 x gated MLP LlamaMLP" in str(report)
    assert_near(got, plain)
    assert pk.unpatch(model) == 16
    pk.patch(model)
    op_counts.clear()
    got = step(model, loss)
    assert op_counts["gated_mlp"] == op_counts["multi_lora_linear"] == op_counts["attention"] == 2
    assert op_counts["lora_linear"] == op_counts["add_rms_norm"] == 2
    assert op_counts["linear_cross_entropy"] == 1
    assert_near(got, plain)
    assert pk.unpatch(model) == 27
    assert all(torch.equal(value, plain[name]) for name, value in step(model, loss).items())
