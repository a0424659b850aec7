"""Training over packed weights in each format: the losses of the dense model, in the packed bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import adapted, llama
from packed_training import Alive, assert_only_packed_bytes, assert_trains_as_dense
from transformers_models import read

import peft_kernels as pk
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.core.formats import FORMATS

each_format = pytest.mark.parametrize("format", FORMATS)


def adapt(model: Any, dtype: torch.dtype | None) -> Any:
    tuned = adapted(model, target_modules="all-linear")
    return tuned if dtype is None else tuned.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_format
def test_trains_as_dense(format: str, dtype: torch.dtype) -> None:
    blocksize = 32 if FORMATS[format].scale == "half" else None
    packed = pk.quantize_model(llama(dtype=dtype), blocksize=blocksize, format=format)
    assert_trains_as_dense(packed, adapt)


@each_format
def test_packed_bytes(format: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    llama(dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", format=format)
    assert_only_packed_bytes(read(tmp_path / "packed", dtype="auto"), tmp_path / "packed", adapt)


def test_a_dense_copy_is_seen() -> None:
    """By the check of what is alive."""
    weight = pk.NF4Weight.quantize(torch.ones(64, 64))
    with Alive() as alive:
        kept = weight.dequantize(torch.bfloat16)
        weight.dequantize(torch.bfloat16)  # not kept
    assert list(alive.storages().values()) == [kept.nbytes]
