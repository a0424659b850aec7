"""Models load their own state dicts, while weights are dense and from the meta device too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import moe_models
import pytest
import torch
from adapter_models import stir
from nf4_weights import assert_equal_weights, parts
from peft_models import config, peft
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.nf4.experts_packing import NF4Experts
from peft_kernels.quantize.model import report_of


def started(init: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return peft.get_peft_model(models.base_model("nf4", seed=seed), config(init_lora_weights=init))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dense_weights_load(init: str, assign: bool) -> None:
    model, other, x = started(init, 0), started(init, 1), models.inputs()
    assert model.base_model.model.q.base_layer.weight.is_dense
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    want = model(x)
    assert not torch.equal(other(x), want)
    for target in (model, other):
        target.load_state_dict(saved, assign=assign)
        assert torch.equal(target(x), want)
        assert target.state_dict().keys() == saved.keys()
        assert isinstance(target.base_model.model.q.base_layer, pk.nn.NF4Linear)
    other.base_model.model.q.base_layer.weight.requantize_()
    assert not other.base_model.model.q.base_layer.weight.is_dense


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_merged_model_loads_and_unmerges_to_nf4(assign: bool) -> None:
    model = peft.get_peft_model(models.base_model("nf4"), config())
    stir(model)
    before = copy.deepcopy(model.base_model.model.q.base_layer.weight)
    model.merge_adapter()
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=assign)
    assert model.base_model.model.q.base_layer.weight.is_merged
    model.unmerge_adapter()
    assert_equal_weights(model.base_model.model.q.base_layer.weight, before)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_other_values_loaded_into_a_merged_weight(assign: bool) -> None:
    layer = models.base_model("nf4").q
    layer.weight.data += 1
    other = testing.tensor(128, 64)
    layer.load_state_dict({"weight": other, "bias": layer.bias.detach()}, assign=assign)
    assert parts(layer.weight).keys() == {"dense"} and torch.equal(layer.weight.dequantize(), other)


def test_packed_items_into_a_dense_weight() -> None:
    layer, other = models.base_model("nf4").q, models.base_model("nf4", seed=1).q
    layer.weight.data.abs_()
    layer.load_state_dict(other.state_dict())
    assert_equal_weights(layer.weight, other.weight)


def test_mismatched_state_dicts() -> None:
    layer = models.base_model("nf4").q
    before = copy.deepcopy(layer)
    dense = {"weight": torch.zeros(128, 64), "bias": torch.ones(128)}
    with pytest.raises(RuntimeError, match="weight: expected the items of an NF4 weight, got dense values"):
        layer.load_state_dict(dense)
    assert_equal_weights(layer.weight, before.weight)
    layer.weight.data.abs_()
    values = layer.weight.dequantize()
    for wrong in (torch.zeros(64, 128), torch.zeros(8192)):
        with pytest.raises(RuntimeError, match=r"weight: expected shape \(128, 64\), got"):
            layer.load_state_dict(dense | {"weight": wrong})
    assert torch.equal(layer.weight.dequantize(), values) and torch.equal(layer.bias, before.bias)


def tiny_gpt2(seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    ).eval()


def test_conv1d_layout_of_dense_values(tmp_path: Path) -> None:
    """A Conv1D stores its weight transposed, and a square one would load wrongly without an error."""
    model, ids = pk.quantize_model(tiny_gpt2()), torch.arange(8)[None]
    for weight in model.parameters():
        if isinstance(weight, pk.NF4Weight):
            weight.data += 0.05
    want = model(ids).logits
    stock = tiny_gpt2(seed=1)
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(stock(ids).logits, want)
    model.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, want)
    other = pk.quantize_model(tiny_gpt2(seed=1))
    for weight in other.parameters():
        if isinstance(weight, pk.NF4Weight):
            weight.data += 0.05
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(ids).logits, want)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_dense_experts_load(kind: str) -> None:
    module, other = moe_models.packed(kind), moe_models.packed(kind)
    for seed, one in enumerate((module, other)):
        for weight in one.parameters():
            if isinstance(weight, pk.NF4Weight):
                weight.data += testing.tensor(*weight.shape, seed=seed, scale=0.01)
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    other.load_state_dict(saved)
    module.load_state_dict(saved)
    assert module.down_proj.is_merged and parts(other.down_proj).keys() == {"dense"}
    assert torch.equal(other.down_proj.dequantize(), module.down_proj.dequantize())
    packed = moe_models.packed(kind)
    with pytest.raises(RuntimeError, match="expected the items of an NF4 weight, got dense values"):
        packed.load_state_dict(saved)


# The meta device


def skeleton(make: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return pk.quantize_model(make(), **options)


def filled(model: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state_dict, assign=True)
    assert not any(p.is_meta for p in model.parameters())
    return model


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_load_into_a_meta_model(double_quant: bool) -> None:
    options: Any = {"blocksize": 32, "double_quant": double_quant}
    model, x = pk.quantize_model(models.Net(), **options), models.inputs()
    empty = skeleton(models.Net, **options)
    reports = report_of(empty), report_of(model)
    assert reports[0] == reports[1] and reports[0] is not None
    for name, want in model.named_parameters():
        got = empty.get_parameter(name)
        assert got.is_meta and (got.shape, got.dtype, got.nbytes) == (want.shape, want.dtype, want.nbytes)
    assert torch.equal(filled(empty, model.state_dict())(x), model(x))


def test_to_empty_of_a_meta_model() -> None:
    model, x = pk.quantize_model(models.Net()), models.inputs()
    empty = skeleton(models.Net)
    with pytest.warns(UserWarning, match=r"q\.weight: loaded into a weight on the meta device.*assign=True"):
        empty.load_state_dict(model.state_dict())
    assert empty.q.weight.is_meta  # type: ignore[union-attr]
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


def test_transformers_models_on_meta() -> None:
    """Of transposed layers, and of experts."""
    ids = torch.arange(3, 11)[None]
    for make, options in ((tiny_gpt2, {}), (lambda: moe_models.model("mixtral"), {"experts": True})):
        torch.manual_seed(0)
        model = pk.quantize_model(make(), **options)
        empty = skeleton(make, **options)
        assert any(isinstance(m, NF4Experts) for m in empty.modules()) == bool(options)
        filled(empty, {k: v.clone() for k, v in model.state_dict().items()})
        for name, want in model.named_parameters():
            if isinstance(want, pk.NF4Weight):
                assert_equal_weights(empty.get_parameter(name), want)
        for name, buffer in model.named_buffers():  # buffers that are in no state dict
            parent, _, own = name.rpartition(".")
            setattr(empty.get_submodule(parent), own, buffer)
        empty.eval(), model.eval()
        assert torch.equal(empty(ids).logits, model(ids).logits)


def test_partly_meta_model() -> None:
    model = models.Net()
    model.o.to("meta")
    with pytest.raises(ValueError, match=r"o\.weight: expected all weights loaded, or all on.*, got 1 of 2"):
        pk.quantize_model(model)
    assert type(model.q) is nn.Linear


def test_accelerate_offload_is_not_a_meta_model() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(models.Net(), "cpu")
    assert model.q.weight.is_meta
    with pytest.raises(ValueError, match="q: expected a loaded layer, got one whose weights accelerate"):
        pk.quantize_model(model)
