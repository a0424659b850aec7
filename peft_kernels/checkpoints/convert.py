"""quantize_checkpoint: a model's folder to NF4 in bitsandbytes' format, one tensor in memory at a time.

All is written into a work folder beside the destination, `.NAME.partial`, and renamed at the end: under the
destination's name there is a whole model or nothing. An interrupted run leaves the work folder, and the next
one takes the shards that are done from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.code_tables import BLOCKSIZES
from ..nf4.bitsandbytes_format import configuration
from .checks import nf4_weights
from .folder import CONFIG, INDEX, OTHER_WEIGHTS, Checkpoint
from .header import CheckpointError, Entry, read_header
from .json_file import read_json
from .layers import Choice, choose
from .shards import Shard, compose
from .writer import sync, sync_all

_JOB, _DONE, _LOCK, _MODEL = "job.json", "done.json", "lock", "model"


@dataclass
class Conversion:
    """What a run will do, or has done."""

    source: Path
    destination: Path
    choice: Choice
    bytes_before: int
    bytes_after: int
    """Of all shards; before they are written, at most."""
    copied: list[str] = field(default_factory=list)
    """Other files of the folder."""
    left_out: list[str] = field(default_factory=list)
    """Other files and folders, which hold weights that are not this model's, or in another format."""
    taken_over: list[str] = field(default_factory=list)
    """Shards that an interrupted run had finished."""


def quantize_checkpoint(
    source: Path | str,
    destination: Path | str,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Iterable[str] = (),
    restart: bool = False,
    experts: bool = False,
    partial: bool = False,
    started: Callable[[Conversion], None] = lambda conversion: None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Conversion:
    """Quantise the linear layers of a model's folder; transformers with bitsandbytes reads the result.

    With `experts`, what comes of it is what a model has saved that was loaded with `NF4Config(experts=True)`,
    in the dtype of the files; this package alone reads it.

    Parameters
    ----------
    source : path
        A folder with config.json and .safetensors files. Nothing in it is changed.
    destination : path
        Must not exist.
    blocksize, double_quant
        As `NF4Weight.quantize`.
    skip : names
        Modules to leave, beside heads, embeddings and norms: full names or consecutive parts of one.
    restart : bool
        Begin anew where an interrupted run could be gone on with.
    experts : bool
        Pack mixtures of experts too, as `quantize_model(experts=True)`.
    partial : bool
        Quantise what is there where the architecture has more tensors, or of other shapes.
    started, progress : callable
        Told what will be done, and then of each tensor and its bytes.

    Raises
    ------
    CheckpointError
        A fault of the source (named), tensors that the architecture has and the source lacks, a source that
        is quantised already or changes meanwhile, a destination that exists, too little space on the disk, a
        tensor with NaN or Inf, an interrupted run that had other settings or was changed; with `experts`, a
        model that has none that can be packed, or not all of them.
    """
    source, destination = Path(source), Path(destination)
    if blocksize not in BLOCKSIZES:
        raise CheckpointError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
    check_destination(destination)
    checkpoint = Checkpoint.open(source)
    _check_dense(checkpoint)
    choice = choose(checkpoint, skip, experts, partial)
    shards = compose(checkpoint, choice, blocksize, double_quant)
    work = destination.absolute().parent / f".{destination.name}.partial"
    job = {
        "source": str(source.resolve()),
        "files": _stamps(checkpoint.files),
        "blocksize": blocksize,
        "double_quant": double_quant,
        "quantise": choice.quantise,
        "experts": sorted(choice.experts),
    }
    with _work_folder(work, job, restart) as model:
        conversion = Conversion(source, destination, choice, 0, 0, *other_files(source, checkpoint))
        conversion.bytes_before = sum(entry.nbytes for entry in checkpoint.entries.values())
        conversion.bytes_after = sum(shard.size for shard in shards)
        conversion.taken_over = _taken_over(work, model, shards)
        others = sum((source / name).stat().st_size for name in conversion.copied)
        check_space(model, sum(s.size for s in shards if s.name not in conversion.taken_over) + others)
        started(conversion)
        for shard in shards:
            if shard.name in conversion.taken_over:
                progress(shard.name, shard.nbytes)
            else:
                shard.write(model / shard.name, progress)
                _note_done(work, model / shard.name)
        if _stamps(checkpoint.files) != job["files"]:
            raise CheckpointError(
                f"{source}: expected files that nobody changes meanwhile, got others (--restart)"
            )
        _finish(model, checkpoint, shards, conversion, blocksize, double_quant)
        sync_all(model)
        try:
            os.rename(model, destination)
        except OSError as error:
            raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
        sync(destination.absolute().parent)
    shutil.rmtree(work, ignore_errors=True)
    return conversion


def _check_dense(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    if not checkpoint.path.is_dir() or not (checkpoint.path / CONFIG).exists():
        raise CheckpointError(f"{checkpoint.path}: expected a model's folder with a config.json, got none")
    if config:
        method = config.get("quant_method", "") if isinstance(config, dict) else ""
        raise CheckpointError(
            f"{checkpoint.path}: expected a dense model, got one that is quantised ({method})"
        )
    quantised = next(iter(nf4_weights(checkpoint.entries)), None)
    if quantised is not None:
        raise CheckpointError(f"{quantised}: expected a dense weight, got one that is quantised")


def _finish(
    model: Path,
    checkpoint: Checkpoint,
    shards: list[Shard],
    conversion: Conversion,
    blocksize: int,
    double_quant: bool,
) -> None:
    """The index, the configuration and other files."""
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries.update(read_header(model / shard.name)[0])
    total = conversion.bytes_after = sum(entry.nbytes for entry in entries.values())
    if (checkpoint.path / INDEX).exists():
        names = {name: entry.path.name for name, entry in sorted(entries.items())}
        write_json(model / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    quantization = _quantization(checkpoint, conversion.choice, blocksize, double_quant)
    write_json(model / CONFIG, checkpoint.config | {"quantization_config": quantization})
    for name in conversion.copied:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / name, model / name)


def _quantization(
    checkpoint: Checkpoint, choice: Choice, blocksize: int, double_quant: bool
) -> dict[str, Any]:
    """What config.json says of it."""
    if not choice.experts:
        dtypes = [checkpoint.entries[name].dtype for name in choice.quantise]
        dtype = max(set(dtypes), key=dtypes.count)
        return configuration(blocksize, double_quant, dtype, choice.skip_modules)
    from ..quantize.transformers.config import NF4Config

    return NF4Config(blocksize, double_quant, choice.skip_modules, experts=True).to_dict()


def other_files(source: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """What is copied, and what is left out.

    Tokenizer, generation_config, chat templates, licence: all but weights, and what is hidden. Weights of an
    adapter go with its configuration, and folders that sentence-transformers calls modules go whole. Another
    folder in which there are weights is left out whole, and not copied without them.
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
        if not path.is_file():  # told now, not when all else is done
            raise CheckpointError(f"{path}: expected a file to copy, got a broken link or no regular file")
    return [str(p.relative_to(source)) for p in copied], [str(p.relative_to(source)) for p in left_out]


def _holds_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".index.json", *OTHER_WEIGHTS))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _modules(source: Path) -> set[str]:
    """Folders of the modules of sentence-transformers."""
    try:
        found = read_json(source / "modules.json", 1_000_000)
    except CheckpointError:
        return set()
    modules = found if isinstance(found, list) else []
    return {str(module["path"]) for module in modules if isinstance(module, dict) and "path" in module}


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """By which it is seen that files have changed."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def check_destination(destination: Path) -> None:
    """Raise CheckpointError unless a new folder can be made there."""
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination}: expected a path where nothing is yet")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"{destination.parent}: expected a folder to write into, got none")


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent.parent}: expected {needed / 1e9:.3g} GB of free space for the result, "
            f"got {free / 1e9:.3g} GB"
        )


def _note_done(work: Path, shard: Path) -> None:
    write_json(work / f"{_DONE}.tmp", _done(work) | _stamps([shard]))
    os.replace(work / f"{_DONE}.tmp", work / _DONE)


def _done(work: Path) -> dict[str, Any]:
    if not (work / _DONE).exists():
        return {}
    found = read_json(work / _DONE, 10_000_000)
    return found if isinstance(found, dict) else {}


def _taken_over(work: Path, model: Path, shards: list[Shard]) -> list[str]:
    """Shards that an interrupted run had finished. All else that is there goes. CheckpointError for one that
    somebody has changed since."""
    done, kept = _done(work), []
    for shard in shards:
        path = model / shard.name
        if path.exists() and shard.name in done:
            layout, entries = shard.layout, read_header(path)[0]
            same = entries.keys() == layout.keys() and all(
                kind is None or kind == (entries[name].dtype, entries[name].shape)
                for name, kind in layout.items()
            )
            if not same or _stamps([path])[shard.name] != done[shard.name]:
                raise CheckpointError(
                    f"{path}: expected the shard that an earlier run made, got a changed one (use --restart)"
                )
            kept.append(shard.name)
    for path in model.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return kept


@contextmanager
def _work_folder(work: Path, job: dict[str, Any], restart: bool) -> Iterator[Path]:
    """Where the model is put together; new, or that of an interrupted run of the same job."""
    work.mkdir(exist_ok=True)
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{work}: another run is at work there") from None
        note, model = work / _JOB, work / _MODEL
        if restart or not note.exists():  # without a note nothing has been begun
            shutil.rmtree(model, ignore_errors=True)
            (work / _DONE).unlink(missing_ok=True)
            temporary = work / f"{_JOB}.tmp"
            temporary.write_text(json.dumps(job))
            os.replace(temporary, note)
        elif not _same_job(note, job):
            raise CheckpointError(
                f"{work}: an interrupted run with another source or other settings is there; "
                "give the same again to go on with it, or --restart to begin anew"
            )
        model.mkdir(exist_ok=True)
        try:
            yield model
        except BaseException:
            if not any(model.glob("*.safetensors")):  # nothing to go on with
                shutil.rmtree(work, ignore_errors=True)
            raise


def _same_job(note: Path, job: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(note.read_text()) == job)
    except ValueError:
        return False


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
