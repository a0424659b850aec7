"""`enable()`: our layers for bitsandbytes' configurations, in the whole process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_models import (
    Auto,
    assert_same_state,
    bnb_config,
    loaded,
    nf4_layers,
    read,
    saved,
    transformers,
)

import peft_kernels as pk
from peft_kernels.integrations import transformers as integration


@pytest.fixture
def enabled() -> Any:
    integration.enable()
    yield
    integration.disable()


def test_enable_loads_bitsandbytes_checkpoints_with_our_layers(enabled: None, tmp_path: Path) -> None:
    model = Auto.from_pretrained(saved(tmp_path / "dense"), quantization_config=bnb_config())
    assert_same_state(model, loaded(tmp_path / "dense"))
    assert nf4_layers(model)
    model.save_pretrained(tmp_path / "4bit")
    again = Auto.from_pretrained(tmp_path / "4bit")
    assert_same_state(model, again)
    assert nf4_layers(again) == nf4_layers(model)
    integration.enable()  # twice is once
    integration.disable()
    assert not nf4_layers(Auto.from_pretrained(tmp_path / "4bit"))


@pytest.mark.parametrize(
    "skip", [["layers.0", "o_proj"], ["_proj"], ["model.layers.[1]", "nothing"]], ids=str
)
def test_enabled_skip_names_are_patterns(skip: list[str], enabled: None, tmp_path: Path) -> None:
    config = bnb_config(llm_int8_skip_modules=skip)
    model = Auto.from_pretrained(saved(tmp_path), quantization_config=config)
    integration.disable()
    theirs = Auto.from_pretrained(tmp_path, quantization_config=config)
    assert nf4_layers(model) == {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}


@pytest.mark.parametrize("double_quant", [True, False])
def test_enable_loads_fp4(double_quant: bool, enabled: None, tmp_path: Path) -> None:
    """The values of bitsandbytes' own model, and a checkpoint that it reads."""
    config = bnb_config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=double_quant)
    model = Auto.from_pretrained(saved(tmp_path / "dense"), quantization_config=config)
    assert nf4_layers(model)
    model.save_pretrained(tmp_path / "4bit")
    assert_same_state(model, Auto.from_pretrained(tmp_path / "4bit"))
    integration.disable()
    assert_same_state(model, read(tmp_path / "4bit"))
    theirs = Auto.from_pretrained(tmp_path / "4bit")
    layer, ours = theirs.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_state.quant_type == "fp4"
    assert torch.equal(pk.NF4Weight.from_bnb(layer.weight).dequantize(), ours.weight.dequantize())


def test_enable_leaves_8_bits_to_bitsandbytes(enabled: None, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = Auto.from_pretrained(saved(tmp_path / "dense"), quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
