"""pk.adapters in models of every family: where adapters are inserted, outputs, and clean removal."""

from __future__ import annotations

import copy
from typing import Any

import bottleneck_models as bm
import models
import pytest
import torch
from bottleneck_models import FAMILIES, add_reference_adapters, output, stir
from rounding import ONE_MODEL
from torch import nn

import peft_kernels as pk
import testing
from peft_kernels.adapters import AdapterConfig
from peft_kernels.adapters.adapter import BottleneckAdapter

adapters = pk.adapters
CONFIGS = {
    "houlsby": AdapterConfig.houlsby(),
    "pfeiffer": AdapterConfig.pfeiffer(norm=True, bias=False, activation="swish"),
    "parallel": AdapterConfig.beside(attention=True),
}
pytestmark = pytest.mark.usefixtures("one_thread")


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return testing.relative_error(got, want) < 2 * ONE_MODEL


def traces(model: nn.Module) -> list[Any]:
    """What adapters might leave behind: modules and their order, hooks, attributes, requires_grad."""
    found: list[Any] = [(name, p.requires_grad) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, type(module), hooks, sorted(vars(module)), module.training))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str) -> None:
    """New adapters change no bit; trained ones equal plain torch in the right layers."""
    about = FAMILIES[family]
    model, inputs, config = about.make(), about.inputs(), CONFIGS[kind]
    bare, before, state = copy.deepcopy(model), output(model, inputs), copy.deepcopy(model.state_dict())
    trace = traces(model)
    adapters.add(model, "one", config)
    adapters.train(model, "one")
    assert torch.equal(output(model, inputs), before)
    stir(model, "one")
    got, want = output(model, inputs), output(add_reference_adapters(about, bare, model, ["one"]), inputs)
    assert close(got, want) and not close(got, before)
    places = len(about.layers) * (config.attention + config.feed_forward)
    r = config.bottleneck_size(64)
    of_each = 2 * 64 * r + (r + 64) * config.bias + 2 * 64 * config.norm
    assert adapters.count(model, "one") == (places * of_each, sum(p.numel() for p in bare.parameters()))
    adapters.delete(model, "one")
    assert traces(model) == trace and torch.equal(output(model, inputs), before)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_training(family: str, base: str) -> None:
    """The loss falls, only the adapter and a new head train, and checkpointing changes no gradient."""
    about = FAMILIES[family]
    model = about.make(base)
    adapters.add(model, "task", AdapterConfig.houlsby(dropout=0.1))
    adapters.train(model, "task")
    adapters.add(model, "other", "pfeiffer")
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("adapters" in name for name in trained)
    assert all("_adapters.adapters.task." in n or n.startswith("classifier.") for n in trained), trained
    labels = about.inputs()["input_ids"] if family == "llama" else torch.tensor([0, 1])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(4)
        return list(torch.autograd.grad(model(**about.inputs(), labels=labels).loss, parameters))

    stir(model, "task")
    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, gradients(), plain))
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-2), []
    for _ in range(8):
        loss = model(**about.inputs(), labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3, losses  # dropout alone moves it by less than a tenth


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_no_input_of_a_sublayer(reentrant: bool) -> None:
    """The recomputation stops inside a layer's last adapter."""
    about = FAMILIES["llama"]
    model, inputs = about.make().train(), about.inputs()
    adapters.add(model, "task", AdapterConfig.beside(attention=True))
    adapters.train(model, "task")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(not site._links.inputs for site in adapters.manage.sites(model))


def test_bitsandbytes_weights_are_counted_unpacked() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = FAMILIES["llama"].make()
    adapters.add(model, "one")
    want = adapters.count(model, "one")
    for at in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        model.set_submodule(at, models.to_linear4bit(model.get_submodule(at)))
    assert adapters.count(model, "one") == want


def test_names_stacks_and_none() -> None:
    about = FAMILIES["llama"]
    model, inputs = about.make(), about.inputs()
    bare, before = copy.deepcopy(model), output(model, inputs)
    assert adapters.names(model) == [] and adapters.active(model) == []
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(model, name, config)
        stir(model, name, 100 * seed)
    assert set(adapters.names(model)) == set(CONFIGS)
    seen = [before]
    for wanted in (["pfeiffer"], ["pfeiffer", "houlsby"], ["houlsby", "pfeiffer"], ["parallel", "houlsby"]):
        adapters.set_active(model, wanted)
        assert adapters.active(model) == wanted
        got = output(model, inputs)
        assert close(got, output(add_reference_adapters(about, copy.deepcopy(bare), model, wanted), inputs))
        assert not any(close(got, other) for other in seen)
        seen.append(got)
    adapters.set_active(model, None)
    assert torch.equal(output(model, inputs), before)
    adapters.set_active(model, ["pfeiffer", "houlsby"])
    adapters.delete(model, "houlsby")
    assert adapters.active(model) == ["pfeiffer"] and torch.equal(output(model, inputs), seen[1])
    adapters.add(model, "late")  # added to sites that were removed
    adapters.set_active(model, ["pfeiffer", "late"])
    assert torch.equal(output(model, inputs), seen[1])


def test_copies_are_independent() -> None:
    about = FAMILIES["bert"]
    model, inputs = about.make(), about.inputs()
    adapters.add(model, "one")
    adapters.set_active(model, "one")
    stir(model, "one")
    want = output(model, inputs)
    for copied in (copy.deepcopy(model), models.pickled(model)):
        assert torch.equal(output(copied, inputs), want)
        stir(copied, "one", 50)
        adapters.delete(copied, "one")
        assert not close(output(copied, inputs), want)
        assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("first", ["adapters", "lora"])
def test_with_lora(first: str, base: str, kind: str) -> None:
    """In either order, and patched: the adapter follows the layer with its LoRA."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    about = FAMILIES["llama"]
    model, inputs = about.make(base), about.inputs()
    lora = peft.LoraConfig(
        target_modules=r".*\.(o_proj|up_proj|gate_proj|down_proj)", init_lora_weights=False
    )

    def with_lora(model: Any) -> Any:
        torch.manual_seed(7)
        return peft.get_peft_model(model, lora)

    bare = with_lora(copy.deepcopy(model))
    steps = {"adapters": lambda m: adapters.add(m, "one", kind) or m, "lora": with_lora}
    for step in (first, *(name for name in steps if name != first)):
        model = steps[step](model)
    stir(model, "one")
    if first == "lora":
        adapters.set_active(model, "one")
    else:  # PEFT has wrapped the hooked layers since
        for site in adapters.manage.sites(model):
            site.active = ("one",)
    want = output(add_reference_adapters(about, bare, model, ["one"], "base_model.model."), inputs)
    assert close(output(model, inputs), want)
    with pk.patched(model):
        assert close(output(model, inputs), want)
    adapters.train(model, "one", freeze=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_" in name for name in trained) and any("adapters.one" in name for name in trained)
    model = model.merge_and_unload()
    assert testing.relative_error(output(model, inputs), want) < (1e-4 if base == "dense" else 0.2)
    adapters.delete(model, "one")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_compiled(kind: str) -> None:
    about = FAMILIES["llama"]
    model, inputs = about.make(), about.inputs()
    del model.model.layers[1]  # one layer is enough to compile
    before = output(model, inputs)
    adapters.add(model, "one", kind)
    adapters.set_active(model, "one")
    stir(model, "one")
    want = output(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert close(output(compiled, inputs), want)
    adapters.set_active(compiled, None)
    assert close(output(compiled, inputs), before)
    adapters.set_active(compiled, "one")
    assert close(output(compiled, inputs), want)


def test_layers_quantised_later_are_found() -> None:
    about = FAMILIES["llama"]
    model, inputs = about.make(), about.inputs()
    bare = copy.deepcopy(model)
    adapters.add(model, "one")
    adapters.set_active(model, "one")
    stir(model, "one")
    for one in (model, bare):
        pk.quantize_model(one)
    assert close(output(model, inputs), output(add_reference_adapters(about, bare, model, ["one"]), inputs))


def test_refused() -> None:
    model = FAMILIES["llama"].make()
    adapters.add(model, "one")
    before = traces(model)
    for call, message in (
        (lambda: adapters.add(model, "one"), "name: there is an adapter 'one' already"),
        (lambda: adapters.add(model, "a.b"), "name: expected letters, digits, _ and -, .*got 'a.b'"),
        (lambda: adapters.add(model, "keys"), "name: expected .* got 'keys'"),
        (lambda: adapters.add(model, "training"), "name: expected .* got 'training'"),
        (
            lambda: adapters.add(nn.ModuleDict({"net": model}), "two"),
            r"model: expected the one .* shares net\.model\.layers\.0\.self_attn\.o_proj with it",
        ),
        (lambda: adapters.train(model, []), "name: expected an adapter or several, got none"),
        (lambda: adapters.set_active(model, 5), "name: expected an adapter or several, got 5"),
        (lambda: adapters.add(model, "two", "lora"), "config: expected an AdapterConfig or one of houlsby"),
        (lambda: adapters.add(model, "two", {}), "config: expected an AdapterConfig or one of houlsby"),
        (lambda: adapters.set_active(model, "two"), "name: expected one of one, got 'two'"),
        (lambda: adapters.train(model, ["one", "one"]), "name: expected different adapters, got one, one"),
        (lambda: adapters.delete(model, "two"), "name: expected one of one, got 'two'"),
        (lambda: adapters.count(model, "two"), "name: expected one of one, got 'two'"),
        (lambda: adapters.add(models.Net(), "x"), "model: expected layers of a transformer .* none in Net"),
        (lambda: AdapterConfig.houlsby(reduction=0), "reduction: expected a finite number, 0.001 at least"),
        (lambda: AdapterConfig.houlsby(activation="tanh"), "activation: expected one of silu, .*got 'tanh'"),
        (lambda: AdapterConfig.houlsby(dropout=2.0), "dropout: expected 0 to 1, got 2.0"),
        (lambda: AdapterConfig.houlsby(norm=1), "norm: expected a bool, got 1"),
        (lambda: AdapterConfig(False, False), "attention, feed_forward: expected one of them or both"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert traces(model) == before
    transformers = bm.transformers
    sizes = bm._TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    moe = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"layers\.0: expected a feed-forward, got a mixture of experts"):
        adapters.add(moe, "one")
    adapters.add(moe, "one", AdapterConfig(attention=True, feed_forward=False))


@pytest.mark.parametrize("parallel", [False, True])
def test_autocast_rounds_what_is_multiplied(parallel: bool) -> None:
    """fp32 parameters, x in autocast's dtype: bit for bit an adapter of rounded weights, with fp32 gradients.
    For other dtypes of x autocast does nothing."""
    config = AdapterConfig(False, True, parallel=parallel, activation="gelu", reduction=4)
    adapter = BottleneckAdapter(config, 64, torch.device("cpu"), torch.float32)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    rounded = copy.deepcopy(adapter)
    rounded.down.data, rounded.up.data = adapter.down.bfloat16(), adapter.up.bfloat16()
    x, beside, dy = testing.tensor(3, 40, 64, dtype=torch.bfloat16).unbind()

    def results(of: BottleneckAdapter, x: torch.Tensor, cast: bool) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_(), *of.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = of(leaves[0], beside.to(x.dtype) if parallel else None)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(x.dtype))]

    got, want = results(adapter, x, True), results(rounded, x, False)
    assert all(torch.equal(g, w.to(g.dtype)) for g, w in zip(got, want, strict=True))
    assert [g.dtype for g in got] == [torch.bfloat16] * 2 + [torch.float32] * 4
    exact = results(adapter, x, False)
    assert not torch.equal(got[0], exact[0]) and testing.relative_error(got[0], exact[0]) < 0.01
    wide = [results(adapter, x.float(), cast) for cast in (True, False)]
    assert all(torch.equal(g, w) for g, w in zip(*wide, strict=True))
