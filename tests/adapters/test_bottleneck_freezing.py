"""What `train` freezes and `delete` restores, whatever else freezes parameters in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from bottleneck_models import FAMILIES

import peft_kernels as pk

adapters = pk.adapters


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "_adapters." not in name}


def peft_model(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))


def for_kbit_training(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def by_hand(model: Any) -> Any:
    return model.requires_grad_(False)


def patched_for_a_while(model: Any) -> Any:
    with pk.patched(model):
        pass
    return model


def quantised(model: Any) -> Any:
    pk.quantize_model(model)
    return model


def packed_in_place(model: Any) -> Any:
    """The weight of a module that is not replaced, as experts' are packed."""
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(pk.NF4Weight.quantize(layer.weight.detach()), requires_grad=False)
    return model


_ALL = (peft_model, for_kbit_training, by_hand, patched_for_a_while, quantised, packed_in_place)
STEPS: dict[str, Callable[[Any], Any]] = {f.__name__: f for f in _ALL}
STEPS |= {"copied": copy.deepcopy, "pickled": models.pickled}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_freezing_by_others(step: str, when: str) -> None:
    """Afterwards those parameters train that would train without the adapter."""
    model, do = FAMILIES["llama"].make(), STEPS[step]
    want = trainable(do(copy.deepcopy(model)))
    if when == "before":
        model = do(model)
    adapters.add(model, "one")
    adapters.train(model, "one")
    assert not trainable(model)
    if when == "after":
        model = do(model)
    adapters.delete(model, "one")
    assert trainable(model) == want
    assert not [name for name, module in model.named_modules() if adapters.freezing.RECORD in vars(module)]


def test_training_again_beside_lora() -> None:
    """What PEFT froze in between stays frozen; its LoRA is restored."""
    model = FAMILIES["llama"].make()
    adapters.add(model, "one")
    adapters.train(model, "one")
    model = peft_model(model)
    want = trainable(model)
    adapters.train(model, "one", freeze=False)
    assert trainable(model) == want and want
    adapters.train(model, "one")
    assert not trainable(model)
    adapters.delete(model, "one")
    assert trainable(model) == want and all("lora_" in name for name in want)


def test_several_in_training() -> None:
    """The last adapter in training restores, once; parameters unfrozen by hand stay so."""
    model = FAMILIES["bert"].make()
    everything = trainable(model)
    for name in ("one", "two", "three"):
        adapters.add(model, name)
    adapters.train(model, ["one", "two"])
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    adapters.delete(model, "one")
    still = trainable(model)
    assert "bert.embeddings.LayerNorm.bias" in still and "bert.embeddings.word_embeddings.weight" not in still
    adapters.train(model, "three")
    adapters.delete(model, "two")
    assert trainable(model) == {"classifier.weight", "classifier.bias"}
    adapters.add(model, "two")
    adapters.delete(model, "three")
    assert trainable(model) == everything and adapters.names(model) == ["two"]
    by_hand(model)
    adapters.delete(model, "two")
    assert not trainable(model)
