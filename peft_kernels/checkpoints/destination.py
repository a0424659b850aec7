"""The folder of a new model: checks beforehand, files other than weights, and the final rename."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .folder import CONFIG, INDEX, OTHER_WEIGHTS, Checkpoint
from .header import CheckpointError, Entry, read_header
from .json_file import read_json
from .writer import sync, sync_all


def check_destination(destination: Path) -> None:
    """Raises CheckpointError unless a new folder can be created there."""
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination}: expected a path where nothing is yet")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"{destination.parent}: expected a folder to write into, got none")


def check_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError if the disk has less free space than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent.parent}: expected {needed / 1e9:.3g} GB of free space for the result, "
            f"got {free / 1e9:.3g} GB"
        )


def other_files(source: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Other files of a model's folder: those to copy, and those to leave out.

    Copies everything except weights and hidden files: tokenizer, generation_config, chat templates, licence.
    An adapter's weights are copied with its configuration, and module folders of sentence-transformers as a
    whole. Other folders that contain weights are left out as a whole.
    """
    copied: list[Path] = []
    left_out: list[Path] = []
    own = {CONFIG, INDEX, *(file.name for file in checkpoint.files)}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in own:
            continue
        if not path.is_dir():
            weights = _holds_weights(path) and not path.name.startswith("adapter_model.")
            (left_out if weights else copied).append(path)
            continue
        files = sorted(one for one in path.rglob("[!.]*") if not one.is_dir() and not _hidden(one, path))
        whole = path.name in _modules(source) or (path / "adapter_config.json").exists()
        if whole or not any(map(_holds_weights, files)):
            copied += files
        else:
            left_out.append(path)
    for path in copied:
        if not path.is_file():  # checked before anything is written
            raise CheckpointError(f"{path}: expected a file to copy, got a broken link or no regular file")
    return [str(p.relative_to(source)) for p in copied], [str(p.relative_to(source)) for p in left_out]


def _holds_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".index.json", *OTHER_WEIGHTS))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _modules(source: Path) -> set[str]:
    """Names of module folders of sentence-transformers."""
    try:
        found = read_json(source / "modules.json", 1_000_000)
    except CheckpointError:
        return set()
    modules = found if isinstance(found, list) else []
    return {str(module["path"]) for module in modules if isinstance(module, dict) and "path" in module}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a work folder for this process. Raises CheckpointError if another one holds it, and warns where
    the file system has no locks."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another run is at work there") from None
        except OSError as error:  # some NFS and Lustre
            warnings.warn(
                f"{folder}: the file system has no locks ({error.strerror}): start no other run for this "
                "destination until this one has ended",
                stacklevel=3,
            )
        yield


def write_other_files(
    model: Path, source: Checkpoint, weights: Iterable[str], config: dict[str, Any], copied: Iterable[str]
) -> int:
    """Writes the index (if the source has one) and the configuration, and copies other files. `weights` names
    the files in `model`. Returns the bytes of all tensors."""
    entries: dict[str, Entry] = {}
    for name in weights:
        entries.update(read_header(model / name)[0])
    total = sum(entry.nbytes for entry in entries.values())
    if (source.path / INDEX).exists():
        files = {name: entry.path.name for name, entry in sorted(entries.items())}
        write_json(model / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    write_json(model / CONFIG, config)
    for name in copied:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, model / name)
    return total


def publish(model: Path, destination: Path) -> None:
    """Puts a complete model on the disk and renames it to its destination."""
    sync_all(model)
    try:
        os.rename(model, destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
    sync(destination.absolute().parent)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
