"""Checkpoints of tiny mixture-of-experts models, for the tests of loading and saving them in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moe_models as moe
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers_models import Auto, NF4Config

from peft_kernels.nf4.experts_packing import NF4Experts


def saved(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    moe.model(kind, dtype).save_pretrained(folder, **options)
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    """Loads a dense checkpoint, quantising it."""
    config = NF4Config(**{"experts": True} | options.pop("nf4", {}))
    return Auto.from_pretrained(folder, quantization_config=config, **options)


def expert_modules(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Experts)}


def stored(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def items_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found
