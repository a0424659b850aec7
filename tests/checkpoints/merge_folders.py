"""Folders of tiny bases and adapters to merge, and PEFT's own merge of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json

import testing
from peft_kernels.checkpoints.folder import Checkpoint

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHARD = "60KB"
CAUSAL = transformers.AutoModelForCausalLM


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def adapt(model: Any, folder: Path, **options: Any) -> Any:
    """A PEFT model with an adapter that changes its outputs, saved to a folder."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**defaults | options))
    trained = ("lora_", "modules_to_save") + ((".bias",) if options.get("bias") else ())
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in trained):
            values = testing.tensor(*parameter.shape, seed=len(name), scale=0.1)
            parameter.data = values.to(parameter.dtype)
    adapted.save_pretrained(folder)
    return adapted


def merged_by_peft(base: Path, adapter: Path, folder: Path, auto: Any = CAUSAL) -> Checkpoint:
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder, max_shard_size=SHARD)
    return Checkpoint.open(folder)


def assert_same_tensors(got: Checkpoint, want: Checkpoint) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


def edit_config(folder: Path, **changes: Any) -> None:
    path = next(folder / name for name in ("adapter_config.json", "config.json") if (folder / name).exists())
    change_json(path, **changes)
