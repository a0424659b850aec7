"""merge_checkpoint: merges a LoRA adapter into a model's folder, with one tensor in memory.

Output is written to a folder next to the destination, `.NAME.merging`, and renamed at the end, so the
destination is complete or missing. After an error nothing is left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..nf4.owners import owner_of
from .checks import quantised_otherwise
from .destination import check_destination, check_space, locked, other_files, publish, write_other_files
from .folder import CONFIG, Checkpoint
from .header import CheckpointError, shown
from .lora_folder import LoraFolder
from .merge_plan import Plan, plan_merge
from .mergeable import WITH_PEFT, check_mergeable
from .merged_file import Rounding, compose
from .owned import owner_in

FORMATS = ("dense", "packed", "nf4")
_QUANTISED = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
"""Files of owners that say how a folder is quantised."""


@dataclass
class Merge:
    """What a run will do, or did."""

    base: Path
    adapter: Path
    destination: Path
    plan: Plan
    title: str
    """The format of a packed base in messages; else ""."""
    form: str
    bytes_before: int
    bytes_after: int = 0
    """Bytes of all tensors; an upper bound before they are written."""
    copied: list[str] = field(default_factory=list)
    """Other files of the base, which are copied."""
    left_out: list[str] = field(default_factory=list)
    """Files and folders of the base with other weights, or about its format where the result is dense, which
    are not copied."""
    rounding: Rounding = field(default_factory=Rounding)
    """Rounding error of repacked weights."""

    @property
    def dense(self) -> bool:
        """Whether the result is dense."""
        return self.form == "dense"


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
        A folder with config.json and .safetensors files: dense, packed by this package or in bitsandbytes'
        NF4, or in another library's format (`nf4.owners`); not changed.
    adapter : path
        A folder that PEFT's `save_pretrained` wrote.
    destination : path
        Must not exist.
    form : str
        "dense": a packed base becomes dense, in its nominal dtype; in another library's format, in that of
        config.json. "packed": it stays in its format with the same blocks; changed weights are repacked,
        which may lose most of what was trained. "nf4": the same, for a base in NF4.
    partial : bool
        Accept a base with missing tensors, or ones of other shapes than the architecture's.
    started, progress : callable
        Called with the plan, and then with the name and bytes of each tensor of the base.

    Raises
    ------
    CheckpointError
        Either folder is damaged; the adapter cannot be merged, or not into this base; the base is quantised
        by another method; "packed" for a dense base, or a format that cannot hold new scales; the destination
        exists; too little disk space; NaN or Inf in a merged or copied tensor.
    """
    base, adapter, destination = Path(base), Path(adapter), Path(destination)
    if form not in FORMATS:
        raise CheckpointError(f"form: expected one of {', '.join(FORMATS)}, got {shown(form)}")
    check_destination(destination)
    checkpoint = Checkpoint.open(base)
    title = _check_base(checkpoint)
    plan = plan_merge(checkpoint, LoraFolder.open(adapter, check_mergeable, WITH_PEFT), partial)
    if form == "nf4" and title:
        raise CheckpointError(f"form: expected dense or packed, for a base in {title}, got nf4")
    title = title or "NF4" * bool(plan.packed)
    if form != "dense" and not title:
        kind = "NF4" if form == "nf4" else "a packed form"
        raise CheckpointError(
            f"{base}: expected a base in {kind} to merge into {kind}, got a dense one: quantise the result"
        )
    before = sum(entry.nbytes for entry in checkpoint.entries.values())
    merge = Merge(base, adapter, destination, plan, title, form, before)
    files = compose(plan, merge.dense, merge.rounding)
    merge.copied, merge.left_out = other_files(base, checkpoint)
    if merge.dense:
        merge.left_out += [name for name in merge.copied if name in _QUANTISED]
        merge.copied = [name for name in merge.copied if name not in _QUANTISED]
    merge.bytes_after = sum(file.size for file in files)
    with _new_folder(destination) as model:
        check_space(model, merge.bytes_after + sum((base / name).stat().st_size for name in merge.copied))
        started(merge)
        for file in files:
            file.write(model / file.name, progress)
        config, names = _config(checkpoint.config, merge), [file.name for file in files]
        merge.bytes_after = write_other_files(model, checkpoint, names, config, merge.copied)
    return merge


def _check_base(checkpoint: Checkpoint) -> str:
    """The title of the owner's format; "" for a dense model or one packed here. Raises CheckpointError unless
    it is one of these."""
    if not checkpoint.path.is_dir() or not (checkpoint.path / CONFIG).exists():
        raise CheckpointError(f"{checkpoint.path}: expected a model's folder with a config.json, got none")
    owner, method = owner_in(checkpoint.config), quantised_otherwise(checkpoint.config)
    if method and owner is None:
        raise CheckpointError(
            f"{checkpoint.path}: expected a base that is dense or in a format that is read packed, got one "
            f"quantised by {method}{_variant(checkpoint.config)}"
        )
    return "" if owner is None else owner.title


def _variant(config: dict[str, Any]) -> str:
    """Why a variant of an owner's format is not read."""
    try:
        owner_of(config["quantization_config"])
    except (ValueError, AttributeError) as error:
        return f" ({shown(str(error))})"
    return ""


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
