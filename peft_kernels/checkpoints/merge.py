"""merge_checkpoint: merges a LoRA adapter into a model's folder, with one tensor in memory.

Output is written to a folder beside the destination, `.NAME.merging`, and renamed at the end, so the
destination is complete or missing. After an error nothing is left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checks import quantised_otherwise
from .destination import check_destination, check_space, locked, other_files, publish, write_other_files
from .folder import CONFIG, Checkpoint
from .header import CheckpointError, shown
from .lora_folder import LoraFolder
from .merge_plan import Plan, plan_merge
from .mergeable import WITH_PEFT, check_mergeable
from .merged_file import Rounding, compose

FORMATS = ("dense", "nf4")


@dataclass
class Merge:
    """What a run will do, or did."""

    base: Path
    adapter: Path
    destination: Path
    plan: Plan
    base_is_packed: bool
    dense: bool
    """Whether the result is dense."""
    bytes_before: int
    bytes_after: int = 0
    """Bytes of all tensors; an upper bound before they are written."""
    copied: list[str] = field(default_factory=list)
    """Other files of the base, which are copied."""
    left_out: list[str] = field(default_factory=list)
    """Files and folders of the base with other weights, which are not copied."""
    rounding: Rounding = field(default_factory=Rounding)
    """Rounding error of repacked weights."""


def merge_checkpoint(
    base: Path | str,
    adapter: Path | str,
    destination: Path | str,
    form: str = "dense",
    partial: bool = False,
    started: Callable[[Merge], None] = lambda merge: None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Merge:
    """Merges a LoRA or DoRA adapter of PEFT into a model's folder.

    Tensors are bit-identical to `PeftModel.merge_and_unload()` and `save_pretrained` of the dense model in
    the dtype of its files.

    Parameters
    ----------
    base : path
        A folder with config.json and .safetensors files: dense, in bitsandbytes' NF4, or with experts packed
        by this package; not changed.
    adapter : path
        A folder that PEFT's `save_pretrained` wrote.
    destination : path
        Must not exist.
    form : str
        "dense": an NF4 base becomes dense, in its nominal dtype. "nf4": it stays NF4 with the same blocks;
        changed weights are repacked, which may lose most of what was trained.
    partial : bool
        Accept a base with missing tensors, or ones of other shapes than the architecture's.
    started, progress : callable
        Called with the plan, and then with the name and bytes of each tensor of the base.

    Raises
    ------
    CheckpointError
        Either folder is damaged; the adapter cannot be merged, or not into this base; the base is quantised
        by another method; "nf4" for a dense base; the destination exists; too little disk space; NaN or Inf
        in a merged or copied tensor.
    """
    base, adapter, destination = Path(base), Path(adapter), Path(destination)
    if form not in FORMATS:
        raise CheckpointError(f"form: expected one of {', '.join(FORMATS)}, got {shown(form)}")
    check_destination(destination)
    checkpoint = Checkpoint.open(base)
    _check_base(checkpoint)
    plan = plan_merge(checkpoint, LoraFolder.open(adapter, check_mergeable, WITH_PEFT), partial)
    if form == "nf4" and not plan.packed:
        raise CheckpointError(
            f"{base}: expected a base in NF4 to merge into NF4, got a dense one: quantise the result"
        )
    before = sum(entry.nbytes for entry in checkpoint.entries.values())
    merge = Merge(base, adapter, destination, plan, bool(plan.packed), form == "dense", before)
    files = compose(checkpoint, plan, merge.dense, merge.rounding)
    merge.copied, merge.left_out = other_files(base, checkpoint)
    merge.bytes_after = sum(file.size for file in files)
    with _new_folder(destination) as model:
        check_space(model, merge.bytes_after + sum((base / name).stat().st_size for name in merge.copied))
        started(merge)
        for file in files:
            file.write(model / file.name, progress)
        config, names = _config(checkpoint.config, merge), [file.name for file in files]
        merge.bytes_after = write_other_files(model, checkpoint, names, config, merge.copied)
    return merge


def _check_base(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless it is a model, dense or in NF4."""
    if not checkpoint.path.is_dir() or not (checkpoint.path / CONFIG).exists():
        raise CheckpointError(f"{checkpoint.path}: expected a model's folder with a config.json, got none")
    method = quantised_otherwise(checkpoint.config)
    if method:
        raise CheckpointError(
            f"{checkpoint.path}: expected a dense base or one in NF4, got one quantised by {method}"
        )


def _config(config: dict[str, Any], merge: Merge) -> dict[str, Any]:
    config = dict(config)
    if merge.dense:
        config.pop("quantization_config", None)
    if merge.plan.untied:
        config["tie_word_embeddings"] = False
        text = config.get("text_config")
        if isinstance(text, dict) and text.get("tie_word_embeddings"):
            config["text_config"] = text | {"tie_word_embeddings": False}
    return config


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A new folder that becomes the destination at the end; after an error it is deleted."""
    work = destination.absolute().parent / f".{destination.name}.merging"
    work.mkdir(exist_ok=True)
    with locked(work):
        model = work / "model"
        try:
            shutil.rmtree(model, ignore_errors=True)  # of a killed run
            model.mkdir()
            yield model
            publish(model, destination)
        finally:
            shutil.rmtree(work, ignore_errors=True)
