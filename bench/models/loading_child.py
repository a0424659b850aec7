"""Loads a checkpoint once in its own process, for loading.py: `loading_child.py HOW FOLDER SMALL`.

First imports everything and loads a SMALL checkpoint the same way. Then prints `ready`, waits for a line,
loads, and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# At the end: an installed peft_kernels, with its compiled library, takes precedence over the source tree.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations.transformers import NF4Config

OURS, MAPPED, IN_MEMORY, BNB, WHOLE = "ours", "mapped", "in-memory", "bnb", "whole"


def load(how: str, folder: str) -> Any:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if how == OURS:
        options["quantization_config"] = NF4Config()
    if how == BNB:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if how == IN_MEMORY:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if how == WHOLE:
        pk.quantize_model(model, progress=False)
    return model


def files() -> list[tuple[int, int]]:
    """Address ranges of mapped files."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.endswith(".safetensors"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end))
    return found


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of NF4 weights, of dense tensors, and of those still in the file."""
    packed = [p for p in model.parameters() if isinstance(p, pk.NF4Weight)]
    dense = [p for p in model.parameters() if not isinstance(p, pk.NF4Weight)]
    ranges = files()
    mapped = [p for p in dense if any(start <= p.data_ptr() < end for start, end in ranges)]
    parts = {"nf4": packed, "dense": dense, "mapped": mapped}
    return {name: sum(p.nbytes for p in part) for name, part in parts.items()}


def main(how: str, folder: str, small: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    load(how, small)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    model = load(how, folder)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, **sizes(model)}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
