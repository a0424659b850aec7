"""Saves and loads adapters: a JSON file with the config and a safetensors file with the parameters, keyed by
the last linear layer of their sublayer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.header import CheckpointError, Entry, read_header, shown
from ..checkpoints.json_file import read_json
from ..checkpoints.writer import Layout, ShardWriter, sync
from . import adapterhub
from .adapter import BottleneckAdapter
from .config import AdapterConfig
from .manage import build, insert, whole
from .site import AdapterSite

CONFIG = "bottleneck_adapter.json"
WEIGHTS = "bottleneck_adapter.safetensors"
FORMAT = "peft_kernels bottleneck adapter"
VERSION = 1
_ADDED_FIELDS = {"after_norm": False}
"""Defaults of fields that older files lack."""
_LARGEST_JSON = 1_000_000
LARGEST_HEADER = 10_000_000
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save(model: nn.Module, name: str, folder: Path | str) -> None:
    """Writes an adapter to `bottleneck_adapter.json` and `bottleneck_adapter.safetensors` in `folder`, which
    is created. The model and its head are not saved.

    Raises ValueError for an unknown adapter, or one that is not in all of the model's layers or was added to
    several parts of it separately.
    """
    tensors, config = _parameters(whole(model, name))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout: Layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with ShardWriter(folder / WEIGHTS, layout, {"format": "pt"}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    about = {"format": FORMAT, "version": VERSION, "name": name, "config": asdict(config)}
    temporary = folder / (CONFIG + ".tmp")
    temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / CONFIG)
    sync(folder)


def load(model: nn.Module, folder: Path | str, load_as: str | None = None) -> str:
    """Loads an adapter that `save` wrote and returns its name. It is inactive, and frozen until `train`. Also
    reads bottlenecks of AdapterHub's library ("seq_bn", "double_seq_bn", "par_bn") for BERT, RoBERTa and
    similar models, without their head.

    Parameters
    ----------
    load_as : str, optional
        Name in this model; by default the saved one.

    Raises
    ------
    CheckpointError (a ValueError)
        Files that are missing, damaged or for another model; NaN or Inf; unsupported options of AdapterHub.
    ValueError
        The name is taken. Nothing is changed on error.
    """
    folder = Path(folder)
    entries: Mapping[str, Entry | adapterhub.Loaded]
    if os.path.lexists(folder / CONFIG) or not os.path.isfile(folder / adapterhub.CONFIG):
        saved_as, config = _checked_config(read_json(folder / CONFIG, _LARGEST_JSON))
        file, entries = WEIGHTS, _read_entries(folder / WEIGHTS)
    else:
        saved_as, config, entries, file = adapterhub.read(
            folder, read_json(folder / adapterhub.CONFIG, _LARGEST_JSON)
        )
    name = saved_as if load_as is None else load_as
    built = build(model, name, config, meta=True)  # a damaged config may ask for any size
    wanted, _ = _parameters(built)
    _check(entries, wanted, file)
    for site, adapter in built:
        for parameter, like in list(adapter.named_parameters()):
            key = _key(site, parameter)
            value = entries[key].read()
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"{file}: {shown(key)}: expected finite numbers, got NaN or Inf")
            setattr(adapter, parameter, nn.Parameter(value.to(site.device), like.requires_grad))
    insert(model, name, built)
    return name


def _parameters(
    built: list[tuple[AdapterSite, BottleneckAdapter]],
) -> tuple[dict[str, Tensor], AdapterConfig]:
    found: dict[str, Tensor] = {}
    for site, adapter in built:
        found |= {_key(site, name): p for name, p in adapter.named_parameters()}
    return found, built[0][1].config


def _key(site: AdapterSite, parameter: str) -> str:
    return f"{site.place.last}.{parameter}"


def _checked_config(about: Any) -> tuple[str, AdapterConfig]:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        got = about.get("format") if isinstance(about, dict) else about
        raise CheckpointError(f"{CONFIG}: expected format {FORMAT!r}, got {shown(got)}")
    if about.get("version") != VERSION:
        raise CheckpointError(f"{CONFIG}: expected version {VERSION}, got {shown(about.get('version'))}")
    name, config = about.get("name"), about.get("config")
    if not isinstance(name, str):
        raise CheckpointError(f"{CONFIG}: expected a name, got {shown(name)}")
    known = {field.name for field in fields(AdapterConfig)}
    if not isinstance(config, dict) or (_ADDED_FIELDS | config).keys() != known:
        expected = ", ".join(sorted(known))
        raise CheckpointError(f"{CONFIG}: expected a config of {expected}, got {shown(config)}")
    try:
        return name, AdapterConfig(**config)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: {shown(str(error))}") from error


def _read_entries(path: Path) -> dict[str, Entry]:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path.parent}: expected {WEIGHTS}, got none")
    return read_header(path, LARGEST_HEADER)[0]


def _check(entries: Mapping[str, Entry | adapterhub.Loaded], wanted: dict[str, Tensor], file: str) -> None:
    for key in wanted:
        if key not in entries:
            raise CheckpointError(f"{file}: expected {key}, as this model has it, got no such tensor")
    for key, entry in entries.items():
        if key not in wanted:
            raise CheckpointError(f"{file}: {shown(key)}: expected parameters of this model's adapter only")
        shape = tuple(wanted[key].shape)
        if entry.shape != shape or entry.dtype not in _DTYPES:
            expected = f"a floating dtype of shape {shape}"
            raise CheckpointError(f"{file}: {key}: expected {expected}, got {entry.dtype} of {entry.shape}")
