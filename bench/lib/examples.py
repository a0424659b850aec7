"""Modules of `examples/`, whose demo model and task some cases train."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"
MODELS = FOLDER.parent / "build" / "methods"
"""Where the demo model is kept."""


def module(name: str) -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def batches(
    pairs: Path | None, tokenizer: Any, length: int, size: int, steps: int, seed: int, held_out: int
) -> tuple[list[Any], list[Any]]:
    """Batches to train on, and held-out ones, of a file of pairs or the demo's."""
    data, lib = module("finetune_data"), module("finetune_model")
    train, rest = data.split(data.read_jsonl(pairs) if pairs else data.docstring_examples())
    training = lib.training_batches(data.encode(train, tokenizer, length), tokenizer, size, steps, seed)
    return training, lib.batches_of(data.encode(rest[:held_out], tokenizer, length), tokenizer, 8)
