"""Fusion across layers: the gated MLP, and projections that share their input, against unpatched PEFT."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from peft_models import in_fp64, lora, peft, run
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import functional, testing
from peft_kernels.integrations import gated_mlp

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Ops by how often they were called."""
    counted: Counter[str] = Counter()
    call = functional._call

    def counting(op: str, *args: Any, **kwargs: Any) -> Any:
        counted[op] += 1
        return call(op, *args, **kwargs)

    monkeypatch.setattr(functional, "_call", counting)
    return counted


class Mlp(nn.Module):
    """The gated MLP of Llama, with what may come in its place."""

    def __init__(self, act_fn: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(64, 128, bias=bias)
        self.up_proj = nn.Linear(64, 128, bias=bias)
        self.down_proj = nn.Linear(128, 64, bias=bias)
        self.act_fn = act_fn or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """As far as its projections go; `memory` is where key and value come from, in cross-attention."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n, bias=bias) for n in (128, 64, 64))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return torch.cat([self.q_proj(x), self.k_proj(memory), self.v_proj(memory)], -1)


class Only(nn.Sequential):
    """Passes all arguments on."""

    def forward(self, *args: Any) -> Any:
        return self[0](*args)


def adapted(
    module: nn.Module, base: str = "dense", dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data = testing.tensor(*parameter.shape, seed=parameter.numel() % 97, scale=0.15)
    model = Only(module).to(dtype)
    if base == "nf4":
        pk.quantize_model(model)
    elif base == "bnb":
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, models.to_linear4bit(child))
        model.is_loaded_in_4bit = True
    return lora(model, **{"target_modules": PROJECTIONS} | options)


def compare(model: Any, x: Tensor, **options: Any) -> Any:
    """Patched against unpatched by the numbers policy; gives the report."""
    truth, plain = run(in_fp64(model), x.double()), run(model, x)
    with pk.patched(model, **options) as report:
        got = run(model, x)
    assert not report.original and not any(e.fallbacks for e in (*report.layers, *report.blocks)), str(report)
    assert got.keys() == plain.keys() == truth.keys()
    for name in got:
        assert testing.relative_error(plain[name], truth[name]) < 0.03, name
        testing.assert_close(got[name], plain[name], truth[name], name)
    return report


BASES = pytest.mark.parametrize("base", models.BASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"target_modules": ["gate_proj", "down_proj", "q_proj", "k_proj", "v_proj"]},
    "lora_bias": {"lora_bias": True},
}


@DTYPES
@BASES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_gated_mlp(options: str, base: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model = adapted(Mlp(bias=True), base, dtype, **OPTIONS[options])
    report = compare(model, testing.tensor(2, 9, 64, dtype=dtype), mlp=True)
    assert [block.kind for block in report.blocks] == ["gated MLP Mlp"]
    assert calls["gated_mlp"] == 1 and not calls["lora_linear"]


@DTYPES
@BASES
def test_shared_input(base: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model = adapted(Attention(), base, dtype)
    report = compare(model, testing.tensor(2, 9, 64, dtype=dtype), qkv=True)
    assert [block.kind for block in report.blocks] == ["projections that share their input"]
    assert calls["multi_lora_linear"] == 1 and not calls["lora_linear"]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_found_by_running_it(name: str) -> None:
    module = Mlp(ACTIVATIONS[name]())
    assert gated_mlp.activation_of(module, gated_mlp.PROJECTIONS[0]) == name
    compare(adapted(module), testing.tensor(7, 64))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


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
def test_an_mlp_with_another_forward_is_left_alone(make: Callable[[], nn.Module], training: bool) -> None:
    """Looked at in evaluation too, in which its dropout would not show."""
    model = adapted(make()).train(training)
    x = testing.tensor(7, 64)
    plain = run(model, x)
    report = pk.patch(model)
    assert [block.fused for block in report.blocks] == [False] and "its forward is not" in str(report)
    for name, value in run(model, x).items():
        assert testing.relative_error(value, plain[name]) < 1e-5, name


def test_what_a_block_cannot_fuse_goes_layer_by_layer(calls: Counter[str]) -> None:
    model = adapted(nn.Sequential(Mlp(), nn.Identity()), use_dora=True)
    compare_layers = run(model, testing.tensor(7, 64))
    report = pk.patch(model)
    got = run(model, testing.tensor(7, 64))
    assert calls["dora_norm"] == 3 and not calls["gated_mlp"]
    assert "gate_proj: DoRA or another variant" in str(report)
    for name in got:
        assert testing.relative_error(got[name], compare_layers[name]) < 1e-5, name


def test_hooks_on_a_projection_still_run() -> None:
    for module, child, options in ((Mlp(), "up_proj", {}), (Attention(), "k_proj", {"qkv": True})):
        model = adapted(module)
        pk.patch(model, **options)
        model(testing.tensor(3, 64))
        seen: list[int] = []
        getattr(model.base_model.model[0], child).register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        model(testing.tensor(3, 64))
        assert seen == [1]


@pytest.mark.parametrize("module", [Mlp, Attention])
def test_disabled_and_merged_adapters(module: type[nn.Module]) -> None:
    model, x = adapted(module()), testing.tensor(7, 64)
    with model.disable_adapter():
        base = model(x)
    y = model(x)
    report = pk.patch(model, qkv=True)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.merge_adapter()
    assert testing.relative_error(model(x), y) < 1e-5
    model.unmerge_adapter()
    assert testing.relative_error(model(x), y) < 1e-5
    assert not any(block.fallbacks for block in report.blocks)


def test_several_adapters_and_mixed_batches() -> None:
    for module in (Mlp(), Attention()):
        model = adapted(module)
        options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
        model.add_adapter("other", peft.LoraConfig(target_modules=PROJECTIONS, **options))
        x, names = testing.tensor(3, 5, 64), ["default", "other", "__base__"]
        mixed = model.eval()(x, adapter_names=names)
        model.base_model.set_adapter(["default", "other"])
        both = model(x)
        pk.patch(model, qkv=True)
        assert testing.relative_error(model(x), both) < 1e-5
        assert testing.relative_error(model(x, adapter_names=names), mixed) < 1e-5
        model.set_adapter("other")
        assert testing.relative_error(model(x), both) > 1e-3


def test_cross_attention_computes_apart(calls: Counter[str]) -> None:
    model = adapted(Attention())
    x, memory = testing.tensor(3, 64), testing.tensor(5, 64).view(5, 64)[:3]
    plain = model(x, memory)
    pk.patch(model, qkv=True)
    assert testing.relative_error(model(x, memory), plain) < 1e-6
    shared = model.base_model.model[0].q_proj.forward.keywords["shared"]
    assert shared.reason == "a later projection is given another x"
    calls.clear()
    assert testing.relative_error(model(x, memory), plain) < 1e-6
    assert calls == {"lora_linear": 3}


def test_a_result_that_nobody_takes_is_not_used_later() -> None:
    """The query alone, twice; then x changed in place between query and key."""
    model = adapted(Attention())
    layer, x = model.base_model.model[0], testing.tensor(3, 64)
    expected = layer.k_proj(2 * x)
    pk.patch(model, qkv=True)
    with torch.no_grad():
        layer.q_proj(x)
        x.mul_(2)
        assert testing.relative_error(layer.k_proj(x), expected) < 1e-6
        layer.q_proj(x)
        layer.q_proj(x)
    assert testing.relative_error(layer.k_proj(x), expected) < 1e-6


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_share_nothing(copying: Callable[[Any], Any]) -> None:
    model, x = adapted(nn.ModuleDict({"mlp": Mlp(), "attention": Attention()})), testing.tensor(3, 64)
    pk.patch(model, qkv=True)
    layers = model.base_model.model[0]
    layers["attention"].q_proj(x)  # activations in flight, which a copy must not take
    twin = copying(model).base_model.model[0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin["mlp"](x).any() and not twin["attention"](x).any()
    assert layers["mlp"](x).any() and layers["attention"](x).any()


def test_llama_model_with_everything(calls: Counter[str]) -> None:
    model = lora(models.tiny_llama(), target_modules=PROJECTIONS)
    ids = torch.arange(24).view(2, 12)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    plain = step()
    report = pk.patch(model, qkv=True)
    got = step()
    assert calls["gated_mlp"] == 2 and calls["multi_lora_linear"] == 2 and calls["lora_linear"] == 2
    assert "2 x gated MLP LlamaMLP" in str(report) and "2 x projections that share" in str(report)
    for name in plain:
        assert testing.relative_error(got[name], plain[name]) < 1e-5, name
    assert pk.unpatch(model) == 16
    assert all(torch.equal(value, plain[name]) for name, value in step().items())
