"""quantize_checkpoint: quantises a model's folder, with one tensor in memory.

Output is written to a work folder next to the destination, `.NAME.partial`, and renamed at the end, so the
destination is complete or missing. An interrupted run leaves the work folder, and the next one reuses its
finished shards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.formats import FORMATS, check_form
from ..nf4 import bitsandbytes_format, packed_format
from ..nf4.bitsandbytes_format import QUANT_TYPES
from .checks import nf4_weights
from .destination import (
    check_destination,
    check_space,
    locked,
    other_files,
    publish,
    write_json,
    write_other_files,
)
from .folder import CONFIG, Checkpoint
from .header import CheckpointError, read_header
from .json_file import read_json
from .layers import Choice, choose
from .owned import owner_in
from .shards import Shard, compose

_JOB, _DONE, _MODEL = "job.json", "done.json", "model"


@dataclass
class Conversion:
    """What a run will do, or did."""

    source: Path
    destination: Path
    choice: Choice
    bytes_before: int
    bytes_after: int
    """Bytes of all shards; an upper bound before they are written."""
    copied: list[str] = field(default_factory=list)
    """Other files, which are copied."""
    left_out: list[str] = field(default_factory=list)
    """Files and folders with other weights or formats, which are not copied."""
    taken_over: list[str] = field(default_factory=list)
    """Shards reused from an interrupted run."""


def quantize_checkpoint(
    source: Path | str,
    destination: Path | str,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    skip: Iterable[str] = (),
    restart: bool = False,
    experts: bool = False,
    partial: bool = False,
    format: str = "nf4",
    started: Callable[[Conversion], None] = lambda conversion: None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Conversion:
    """Quantises the linear layers of a model's folder.

    transformers with bitsandbytes reads the result in NF4 and FP4. Only this package reads other formats and
    packed `experts`: the result then equals a saved model that was loaded with `NF4Config(experts=experts,
    format=format)` in the dtype of the files.

    Parameters
    ----------
    source : path
        A folder with config.json and .safetensors files; not changed.
    destination : path
        Must not exist.
    blocksize : int, optional
        As `PackedWeight.quantize`.
    double_quant : bool, optional
        Of NF4 and FP4, quantise the scales too; of int4, give blocks zero points. By default True. Other
        formats take none.
    skip : names
        Modules to skip in addition to heads, embeddings and norms: full names or consecutive parts of one.
    restart : bool
        Start over instead of continuing an interrupted run.
    experts : bool
        Also pack mixtures of experts, as `quantize_model(experts=True)`.
    partial : bool
        Accept missing tensors, or ones of other shapes than the architecture's.
    format : str
        As `PackedWeight.quantize`.
    started, progress : callable
        Called with the plan, and then with the name and bytes of each tensor.

    Raises
    ------
    CheckpointError
        The source is damaged, incomplete, quantised already or changes meanwhile; the destination exists; too
        little disk space; NaN or Inf in a tensor; an interrupted run with other settings, or changed since;
        with `experts`, no experts, or some that cannot be packed; a blocksize, `double_quant` or rows that
        the format does not have.
    """
    source, destination = Path(source), Path(destination)
    blocksize = _check_form(format, blocksize, double_quant)
    double_quant = double_quant is not False
    check_destination(destination)
    checkpoint = Checkpoint.open(source)
    _check_dense(checkpoint)
    choice = choose(checkpoint, skip, experts, partial, format)
    shards = compose(checkpoint, choice, blocksize, double_quant, format)
    work = destination.absolute().parent / f".{destination.name}.partial"
    job = {
        "source": str(source.resolve()),
        "files": _stamps(checkpoint.files),
        "blocksize": blocksize,
        "double_quant": double_quant,
        "format": format,
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
                f"{source}: expected files that do not change meanwhile, got changed ones (--restart)"
            )
        quantization = _quantization(checkpoint, choice, blocksize, double_quant, format)
        config = checkpoint.config | {"quantization_config": quantization}
        names = [shard.name for shard in shards]
        conversion.bytes_after = write_other_files(model, checkpoint, names, config, conversion.copied)
        publish(model, destination)
    shutil.rmtree(work, ignore_errors=True)
    return conversion


def _check_form(format: str, blocksize: int | None, double_quant: bool | None) -> int:
    """The blocksize. Raises CheckpointError for what the format does not have."""
    try:
        blocksize = check_form(format, blocksize)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if double_quant is not None and not FORMATS[format].takes_double_quant:
        raise CheckpointError(
            f"double_quant: expected no choice for {format}, whose scales have one form, got {double_quant}"
        )
    return blocksize


def _check_dense(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    if not checkpoint.path.is_dir() or not (checkpoint.path / CONFIG).exists():
        raise CheckpointError(f"{checkpoint.path}: expected a model's folder with a config.json, got none")
    owner = owner_in(checkpoint.config)
    if owner is not None:
        raise CheckpointError(
            f"{checkpoint.path}: expected a dense model, got one that is packed already ({owner.title})"
        )
    if config:
        method = config.get("quant_method", "") if isinstance(config, dict) else ""
        raise CheckpointError(
            f"{checkpoint.path}: expected a dense model, got one that is quantised ({method})"
        )
    quantised = next(iter(nf4_weights(checkpoint.entries)), None)
    if quantised is not None:
        raise CheckpointError(f"{quantised}: expected a dense weight, got one that is quantised")


def _quantization(
    checkpoint: Checkpoint, choice: Choice, blocksize: int, double_quant: bool, format: str
) -> dict[str, Any]:
    """The quantization_config of config.json."""
    if not choice.experts and format in QUANT_TYPES:
        dtypes = [checkpoint.entries[name].dtype for name in choice.quantise]
        dtype = max(set(dtypes), key=dtypes.count)
        return bitsandbytes_format.configuration(blocksize, double_quant, dtype, choice.skip_modules, format)
    experts = bool(choice.experts)
    return packed_format.configuration(blocksize, double_quant, None, choice.skip_modules, experts, format)


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of files, to detect changes."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _note_done(work: Path, shard: Path) -> None:
    write_json(work / f"{_DONE}.tmp", _done(work) | _stamps([shard]))
    os.replace(work / f"{_DONE}.tmp", work / _DONE)


def _done(work: Path) -> dict[str, Any]:
    if not (work / _DONE).exists():
        return {}
    found = read_json(work / _DONE, 10_000_000)
    return found if isinstance(found, dict) else {}


def _taken_over(work: Path, model: Path, shards: list[Shard]) -> list[str]:
    """Names of shards that an interrupted run finished; other files in `model` are deleted. Raises
    CheckpointError for a shard that was changed since."""
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
    """The folder in which the model is written: new, or that of an interrupted run of the same job."""
    work.mkdir(exist_ok=True)
    with locked(work):
        note, model = work / _JOB, work / _MODEL
        if restart or not note.exists():  # without a job file nothing was written
            shutil.rmtree(model, ignore_errors=True)
            (work / _DONE).unlink(missing_ok=True)
            temporary = work / f"{_JOB}.tmp"
            temporary.write_text(json.dumps(job))
            os.replace(temporary, note)
        elif not _same_job(note, job):
            raise CheckpointError(
                f"{work}: an interrupted run with another source or other settings is there; "
                "repeat them to continue it, or --restart to start over"
            )
        model.mkdir(exist_ok=True)
        try:
            yield model
        except BaseException:
            if not any(model.glob("*.safetensors")):  # nothing to continue
                shutil.rmtree(work, ignore_errors=True)
            raise


def _same_job(note: Path, job: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(note.read_text()) == job)
    except ValueError:
        return False
