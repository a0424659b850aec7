"""Folders of models that transformers loads packed, for the fuzzer: every format that files have.

A damaged one is refused with an error about it, or the model can be used. What loading refuses because of its
weights, `peft-kernels inspect` reports.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import random
from collections.abc import Callable, Container
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from all_folders import AS_OTHERS, EXPERTS, FOLDERS, packed
from checkpoint_damage import DAMAGE, WILD
from fuzz_checks import check_sentence, check_values, fill
from safetensors import SafetensorError
from transformers_models import ids, llama, read, transformers

import peft_kernels as pk
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.cli.main import main
from peft_kernels.core.formats import FORMATS
from peft_kernels.nf4.owners import OWNERS

TINY: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
REFUSALS = (ValueError, OSError, RuntimeError, SafetensorError)
"""Of loading: ours, transformers' for files that are missing or weights of other shapes, safetensors'."""


def folders(parent: Path, only: Container[str] | None = None) -> list[Folder]:
    """One for each format of ours and of others, or those named."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("peft_kernels").setLevel(logging.ERROR)
    write: dict[str, Callable[[Path], Any]] = {}
    for made in (*FOLDERS.values(), *map(packed, sorted(AS_OTHERS))):
        options = TINY | ({"num_local_experts": 2, "head_dim": 16} if OWNERS[made.owner].experts else {})
        write.setdefault(f"of {made.owner}", functools.partial(made.write, **options))
    for kind, form in EXPERTS.items():
        # Of FP8, parts of experts' weights have rows of whole blocks.
        sizes = {"hidden_size": 128, "intermediate_size": 128} if form == "fp8" else {}
        write[kind] = functools.partial(
            FOLDERS[kind].write, **TINY | {"num_experts": 2, "head_dim": 16} | sizes
        )
    llama(**TINY).to(torch.bfloat16).save_pretrained(parent / "dense")
    for format in FORMATS:
        write[format] = lambda path, format=format: _quantised(parent / "dense", path, format)  # type: ignore[misc]
    chosen = [name for name in write if only is None or name in only]
    return [Folder(name, parent / f"{name} folder", write[name]) for name in chosen]


def _quantised(dense: Path, path: Path, format: str) -> None:
    blocksize = 32 if 32 in FORMATS[format].blocksizes else None
    quantize_checkpoint(dense, path, blocksize, format=format)


class Folder:
    """A valid folder, of which every case damages a copy."""

    def __init__(self, name: str, path: Path, write: Callable[[Path], Any]) -> None:
        write(path)
        (path / "generation_config.json").unlink(missing_ok=True)
        self.name, self.config = name, (path / "config.json").read_bytes()
        self.files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "config.json"}
        self.damage = {kind: how for kind, how in DAMAGE.items() if kind != "edit_index"}
        if not any(b".quant_state." in data for data in self.files.values()):
            self.damage.pop("edit_json", None)

    def case(self, broken: Path, rng: random.Random) -> str:
        """Damages the weights, or the configuration of their quantisation: other parts of config.json are
        transformers'. Returns the outcome."""
        fill(broken, self.files)
        kinds = [*self.damage, "edit_config"]
        kind = rng.choices(kinds, [*(weight for _, weight in self.damage.values()), 3])[0]
        if kind != "edit_config":
            self.damage[kind][0](broken, rng)
        (broken / "config.json").write_bytes(self.config)
        if kind == "edit_config":
            _edit_config(broken / "config.json", rng)
        refused = self.load(broken)
        found = _inspected(broken)
        if refused is not None and kind != "edit_config":
            assert found, f"{self.name}: loading says {refused!r}, inspect finds no fault"
        return f"{kind} {'accepted' if refused is None else 'refused'}"

    def load(self, broken: Path) -> str | None:
        """The refusal; None for a model that can be used."""
        try:
            model = read(broken, dtype=torch.float32)
        except REFUSALS as error:
            assert len(str(error)) > 10, f"no sentence: {error!r}"
            return str(error)
        for weight in model.parameters():
            if isinstance(weight, pk.NF4Weight):
                check_values(weight)
        if all(tensor.is_floating_point() for tensor in model.parameters()):  # transformers keeps dtypes
            model(input_ids=ids())
        return None


def _edit_config(path: Path, rng: random.Random) -> None:
    config = json.loads(path.read_text())
    stored = config["quantization_config"]
    key = rng.choice((*stored, "format", "blocksize", "quant_method", "more"))
    if rng.random() < 0.2:
        stored.pop(key, None)
    else:
        stored[key] = rng.choice([value for value in WILD if value != 10**5000])  # json cannot print it
    path.write_text(json.dumps(config))


def _inspected(folder: Path) -> list[str]:
    """The faults that `peft-kernels inspect` finds, or the error that it ends with."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["inspect", str(folder), "--json"])
    assert code in (0, 1)
    report = json.loads(out.getvalue())
    found: list[str] = report["faults"] if "faults" in report else [report["error"]]
    for sentence in found:
        check_sentence(sentence)
    assert bool(found) == bool(code)
    return found
