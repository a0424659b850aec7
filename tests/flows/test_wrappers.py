"""Wrappers around patched or packed models: DDP, FSDP, accelerate's hooks, replicas of DataParallel."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_checks import (
    Calls,
    assert_fused,
    assert_near,
    fallbacks,
    fused_layers,
    language_loss,
    lora_layers,
    step,
)
from flow_models import adapted, ids, llama, patched_copy
from installed import before
from moe_models import qwen_moe
from rounding import ONE_MODEL
from torch import nn

import peft_kernels as pk
from peft_kernels.core.formats import FORMATS

OWN = pytest.mark.parametrize("base", ["dense", "nf4"])


def assert_fused_or_reported(model: nn.Module, report: Any) -> None:
    """Each layer is fused, or the report has a reason for every call that was not."""
    reasons = fallbacks(report)
    not_fused = lora_layers(model) - fused_layers(report)
    assert all(reason.strip() for reason in reasons)
    for layer in report.layers:
        if layer.name in not_fused:
            assert layer.reason, str(report)


# Processes.


@pytest.fixture
def _gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve


@pytest.fixture
def _single_process(_gloo: None) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def small(base: str) -> Any:
    return adapted(llama(base, num_hidden_layers=1), r=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("_single_process")
def test_fsdp1(when: str) -> None:
    """Unsharded parameters are views, not nn.Parameters: values are correct, and layers fused or reported."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    stock = small("dense")
    want = step(stock, lambda m: language_loss(m, ids()))
    model = small("dense")
    report = pk.patch(model) if when == "before" else None
    block = type(model.base_model.model.model.layers[0])
    wrapped = FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({block}),
    )
    if when == "after":
        report = pk.patch(wrapped)
    loss = language_loss(wrapped, ids())
    loss.backward()
    assert loss.item() == pytest.approx(want["loss"].item(), rel=ONE_MODEL)
    got = {
        name.replace("_fsdp_wrapped_module.", ""): p.grad.reshape(-1)
        for name, p in wrapped.named_parameters()
        if p.grad is not None
    }
    assert_near(got, {name: value.reshape(-1) for name, value in want.items() if name != "loss"})
    assert_fused_or_reported(wrapped if when == "after" else model, report)


# accelerate.


def hooked(model: Any) -> None:
    """An AlignDevicesHook on every module that only moves inputs, as dispatch_model adds."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    for module in model.modules():
        if not list(module.children()):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))


def dispatched(model: Any, target: str, folder: Path | None = None) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    device_map = {"": "cpu"} if target == "cpu" else {"base_model.model.lm_head": "cpu"}
    if target != "cpu":
        device_map |= {
            "base_model.model.model.embed_tokens": "cpu",
            "base_model.model.model.norm": "cpu",
            "base_model.model.model.rotary_emb": "cpu",
            "base_model.model.model.layers.0": "cpu",
            "base_model.model.model.layers.1": "disk",
        }
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", [hooked, lambda m: dispatched(m, "cpu")], ids=["each-module", "dispatch"])
@OWN
def test_hooks_that_only_move_x(base: str, place: Callable[[Any], Any], when: str) -> None:
    stock = adapted(llama(base))
    want = step(stock, lambda m: language_loss(m, ids()))
    model = adapted(llama(base))
    report = pk.patch(model) if when == "before" else None
    place(model)
    if report is None:
        report = pk.patch(model)
    with Calls() as calls:
        got = step(model, lambda m: language_loss(m, ids()))
    assert_near(got, want)
    assert_fused_or_reported(model, report)
    claimed = fused_layers(report) & lora_layers(model)
    assert bool(calls.fused) == bool(claimed) or fallbacks(report), str(report)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_the_whole_model_leaves_every_layer_fused(when: str) -> None:
    """As from_pretrained(device_map=...) on one device."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = adapted(llama("nf4"))
    report = pk.patch(model) if when == "before" else None
    hooks.add_hook_to_module(model.base_model.model, hooks.AlignDevicesHook(execution_device="cpu"))
    report = report or pk.patch(model)
    step(model, lambda m: language_loss(m, ids()))
    assert_fused(model, report, blocks=2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_removed(when: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    stock = adapted(llama("nf4"))
    model, _ = patched_copy(stock)
    hooked(model)
    if when == "before":
        pk.unpatch(model)
    hooks.remove_hook_from_submodules(model)
    if when == "after":
        pk.unpatch(model)
    want = step(stock, lambda m: language_loss(m, ids()))
    with Calls() as calls:
        assert_near(step(model, lambda m: language_loss(m, ids())), want)
    assert calls.fused == 0, calls.counts


@pytest.mark.parametrize("when", ["before", "after"])
@OWN
def test_layer_offloaded_to_disk(base: str, when: str, tmp_path: Path) -> None:
    """Weights exist only during a forward; offloading is for evaluation."""
    stock = adapted(llama(base)).eval()
    model = adapted(llama(base)).eval()
    report = pk.patch(model) if when == "before" else None
    model = dispatched(model, "disk", tmp_path)
    report = report or pk.patch(model)
    with torch.no_grad():
        got, want = (each(input_ids=ids()).logits for each in (model, stock))
    assert_near({"logits": got}, {"logits": want})
    assert_fused_or_reported(model, report)


def test_layer_offloaded_to_host_memory() -> None:
    """cpu_offload moves NF4 weights packed for each call; they are back when the hooks are removed."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    stock = adapted(llama("nf4")).eval()
    model, report = patched_copy(stock)
    state = model.state_dict()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)
    weights = [w for w in model.parameters() if isinstance(w, pk.NF4Weight)]
    assert weights and all(w.is_meta and not w.is_dense for w in weights)
    with torch.no_grad():
        got, want = (each(input_ids=ids()).logits for each in (model, stock))
    assert_near({"logits": got}, {"logits": want})
    assert any("offloads weights" in reason for reason in fallbacks(report)), str(report)
    accelerate.hooks.remove_hook_from_submodules(model)
    for name, weight in stock.named_parameters():
        if isinstance(weight, pk.NF4Weight):
            assert torch.equal(model.get_parameter(name).packed, weight.packed), name
    with Calls() as calls:
        assert_near(
            step(model, lambda m: language_loss(m, ids())), step(stock, lambda m: language_loss(m, ids()))
        )
    assert calls.fused


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("format", FORMATS)
def test_offloaded_formats(format: str, place: str, tmp_path: Path) -> None:
    """Layers and experts of each format compute the same, and are the same when the hooks are removed."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    blocksize = 32 if FORMATS[format].scale == "half" else None
    stock = pk.quantize_model(qwen_moe().eval(), experts=True, blocksize=blocksize, format=format)
    model, device = copy.deepcopy(stock), torch.device("cpu")
    if place == "cpu_offload":
        accelerate.cpu_offload(model, device)
    elif place == "disk_offload":
        accelerate.disk_offload(model, tmp_path, device)
    else:
        device_map = {"model": "disk", "lm_head": "cpu"}
        accelerate.dispatch_model(model, device_map, device, offload_dir=tmp_path, force_hooks=True)
    packed = [name for name, weight in stock.named_parameters() if isinstance(weight, pk.NF4Weight)]
    assert packed and all(model.get_parameter(name).is_meta for name in packed)
    with torch.no_grad():
        got, want = (each(input_ids=ids()).logits for each in (model, stock))
    assert torch.equal(got, want)
    accelerate.hooks.remove_hook_from_submodules(model)
    items = model.state_dict()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(items[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_on_several_devices(when: str) -> None:
    """device_map="auto" with the meta device as the second: weights are moved packed, x between blocks, and
    every layer is fused."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted(llama("nf4")).eval()
    report = pk.patch(model) if when == "before" else None
    names = ("embed_tokens", "rotary_emb", "layers.0"), ("layers.1", "norm")
    device_map = {f"base_model.model.model.{name}": "cpu" for name in names[0]}
    device_map |= {f"base_model.model.model.{name}": "meta" for name in names[1]}
    device_map["base_model.model.lm_head"] = "meta"
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    report = report or pk.patch(model)
    for name, weight in model.named_parameters():
        if isinstance(weight, pk.NF4Weight):
            assert weight.is_meta == ("layers.1" in name) and not weight.is_dense, name
    seen = []
    for i, block in enumerate(model.base_model.model.model.layers):
        block.register_forward_hook(lambda _, args, out, i=i: seen.append((i, out.device.type)))
    with Calls() as calls, torch.no_grad():
        model.base_model.model.model(input_ids=ids())
    assert seen == [(0, "cpu"), (1, "meta")] and calls.fused >= 6, (seen, calls.counts)
    assert not fallbacks(report), str(report)


@pytest.mark.parametrize("kind", ["matrix", "experts"])
def test_parameter_attributes_used_by_accelerate(kind: str) -> None:
    dense = torch.randn(*((3,) if kind == "experts" else ()), 32, 64)
    weight = nn.Parameter(pk.NF4Weight.quantize(dense), requires_grad=False)
    again = type(weight)(weight.to("cpu"), requires_grad=False)
    assert isinstance(again, pk.NF4Weight) and isinstance(again, nn.Parameter)
    assert torch.equal(again.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="NF4 weights are frozen"):
        type(weight)(weight, requires_grad=True)


def test_trainer_does_not_replicate_an_nf4_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer uses DataParallel with two GPUs, but not for a quantised model."""
    if before("transformers", "5.10"):
        pytest.skip("this Trainer replicates models in 4 bits, those of bitsandbytes too")
    import transformers

    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    trainer = transformers.Trainer(model=adapted(llama("nf4")), args=arguments)

    class NoDataParallel(nn.DataParallel):
        def __init__(self, *_: Any) -> None:
            pytest.fail("DataParallel over NF4 weights")

    monkeypatch.setattr(nn, "DataParallel", NoDataParallel)
    assert trainer._wrap_model(trainer.model) is trainer.model
