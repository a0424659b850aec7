"""merge_checkpoint: a LoRA adapter into the model's folder that it is for, one tensor in memory at a time.

The result is put together in a folder beside the destination, `.NAME.merging`, and renamed at the end: under
the destination's name there is a whole model or nothing. After an error nothing is left of it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checks import quantised_otherwise
from .convert import check_destination, check_space, other_files, write_json
from .folder import CONFIG, INDEX, Checkpoint
from .header import CheckpointError, Entry, read_header, shown
from .lora_folder import LoraFolder
from .merge_plan import Plan, plan_merge
from .mergeable import WITH_PEFT, check_mergeable
from .merged_file import MergedFile, Rounding, compose
from .writer import sync, sync_all

FORMATS = ("dense", "nf4")


@dataclass
class Merge:
    """What a run will do, or has done."""

    base: Path
    adapter: Path
    destination: Path
    plan: Plan
    base_is_packed: bool
    dense: bool
    """Whether all of the result is dense."""
    bytes_before: int
    bytes_after: int = 0
    """Of all tensors; before they are written, at most."""
    copied: list[str] = field(default_factory=list)
    """Other files of the base."""
    left_out: list[str] = field(default_factory=list)
    """Other files and folders of the base, which hold weights that are not merged."""
    rounding: Rounding = field(default_factory=Rounding)
    """Where weights were packed again."""


def merge_checkpoint(
    base: Path | str,
    adapter: Path | str,
    destination: Path | str,
    form: str = "dense",
    partial: bool = False,
    started: Callable[[Merge], None] = lambda merge: None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Merge:
    """Merge a LoRA or DoRA adapter of PEFT into a model's folder.

    The tensors are, to the bit, what `PeftModel.merge_and_unload()` and `save_pretrained` make of the dense
    model in the dtype of its files.

    Parameters
    ----------
    base : path
        A folder with config.json and .safetensors files: dense, in NF4 as bitsandbytes stores it, or with
        experts as this package packs them. Nothing in it is changed.
    adapter : path
        A folder that PEFT's `save_pretrained` has written.
    destination : path
        Must not exist.
    form : str
        "dense": a base in NF4 becomes dense, in the dtype that it was quantised from. "nf4": it stays NF4, of
        the same blocks; what the adapter changed is packed again, and may lose most of what was trained.
    partial : bool
        Merge into a base that lacks tensors of its architecture, or has them of other shapes.
    started, progress : callable
        Told what will be done, and then of each tensor of the base and its bytes.

    Raises
    ------
    CheckpointError
        A fault of either folder (named); an adapter that cannot be merged, or not into this base; a base
        quantised in another way; "nf4" for a dense base; a destination that exists; too little space on the
        disk; NaN or Inf in what is merged or copied.
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
        _finish(model, checkpoint, files, merge)
    return merge


def _check_base(checkpoint: Checkpoint) -> None:
    """That it is a model, dense or in NF4."""
    if not checkpoint.path.is_dir() or not (checkpoint.path / CONFIG).exists():
        raise CheckpointError(f"{checkpoint.path}: expected a model's folder with a config.json, got none")
    method = quantised_otherwise(checkpoint.config)
    if method:
        raise CheckpointError(
            f"{checkpoint.path}: expected a dense base or one in NF4, got one quantised by {method}"
        )


def _finish(model: Path, checkpoint: Checkpoint, files: list[MergedFile], merge: Merge) -> None:
    """The index, the configuration and other files."""
    entries: dict[str, Entry] = {}
    for file in files:
        entries.update(read_header(model / file.name)[0])
    merge.bytes_after = sum(entry.nbytes for entry in entries.values())
    if (checkpoint.path / INDEX).exists():
        names = {name: entry.path.name for name, entry in sorted(entries.items())}
        write_json(model / INDEX, {"metadata": {"total_size": merge.bytes_after}, "weight_map": names})
    write_json(model / CONFIG, _config(checkpoint.config, merge))
    for name in merge.copied:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / name, model / name)


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
    """A folder to fill. It gets the destination's name when it is whole and on the disk; after an error
    nothing is left of it."""
    work = destination.absolute().parent / f".{destination.name}.merging"
    work.mkdir(exist_ok=True)
    with _locked(work):
        model = work / "model"
        try:
            shutil.rmtree(model, ignore_errors=True)  # of a run that was killed
            model.mkdir()
            yield model
            sync_all(model)
            try:
                os.rename(model, destination)
            except OSError as error:
                raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
            sync(destination.absolute().parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{folder}: another run is at work there") from None
        yield
