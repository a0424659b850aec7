"""load_checkpoint: loads a file or folder into a model, completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.wrong_types import names_wrong_types
from ..nf4.weight import PackedWeight
from .checks import nf4_weights, read_nf4
from .folder import Checkpoint
from .header import CheckpointError, Entry, shown


@names_wrong_types
def load_checkpoint(model: nn.Module, path: Path | str, strict: bool = True) -> None:
    """Loads a checkpoint into a model with NF4 layers where the checkpoint has them.

    Everything is read and checked before the model changes, so a checkpoint that does not fit changes
    nothing. Meanwhile the tensors are in memory twice.

    Parameters
    ----------
    model : nn.Module
        On any device; quantised (`quantize_model`) where the checkpoint is NF4. Keeps its dtypes, but NF4
        weights get the checkpoint's nominal dtype.
    path : path
        A .safetensors file, or a folder of them with or without an index.
    strict : bool
        Require the same set of tensors in model and checkpoint.

    Raises
    ------
    CheckpointError
        (a ValueError) A tensor does not fit.
    """
    checkpoint = Checkpoint.open(path)
    places = _places(model)
    quantised = nf4_weights(checkpoint.entries)
    _check_names(places, checkpoint, quantised, strict)
    new: dict[str, Tensor] = {}
    for name, entry in checkpoint.entries.items():
        if name in places and name not in quantised:
            new[name] = _plain(name, places[name], entry)
    for name, names in quantised.items():
        if name in places:
            new[name] = _nf4(name, places[name], checkpoint, names)
    for name, tensor in new.items():
        places[name].data = tensor


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, by all names of tied ones."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _check_names(
    places: dict[str, Tensor], checkpoint: Checkpoint, quantised: dict[str, list[str]], strict: bool
) -> None:
    there = {id(places[name]) for name in checkpoint.entries if name in places}
    for name, place in places.items():
        if strict and id(place) not in there:
            raise CheckpointError(f"{name}: the checkpoint has no tensor of this name, the model has")
        if isinstance(place, PackedWeight) and name in checkpoint.entries and name not in quantised:
            raise CheckpointError(f"{name}: expected an NF4 weight, got a plain tensor")
    items = {item for names in quantised.values() for item in names}
    for name in checkpoint.entries:
        if strict and name not in places and name not in items:
            raise CheckpointError(f"{shown(name)}: the model has no tensor of this name, the checkpoint has")
    for name in quantised:
        if name not in places:
            if strict:
                raise CheckpointError(f"{shown(name)}: the model has no weight of this name")
        elif not isinstance(places[name], PackedWeight):
            raise CheckpointError(
                f"{name}: expected a plain tensor, got an NF4 weight (quantize_model first)"
            )


def _plain(name: str, place: Tensor, entry: Entry) -> Tensor:
    if entry.shape != tuple(place.shape):
        raise CheckpointError(f"{name}: expected shape {tuple(place.shape)}, got {entry.shape}")
    if entry.dtype != place.dtype and not (entry.dtype.is_floating_point and place.dtype.is_floating_point):
        raise CheckpointError(f"{name}: expected dtype {place.dtype}, got {entry.dtype}")
    return entry.read().to(place.device, place.dtype)


def _nf4(name: str, place: Any, checkpoint: Checkpoint, names: list[str]) -> Tensor:
    state, dtype = read_nf4(checkpoint, name, names)
    if state.shape != tuple(place.shape):
        raise CheckpointError(f"{name}: expected shape {tuple(place.shape)}, got {state.shape}")
    state.name = place._state.name
    with torch.no_grad():
        weight: Tensor = PackedWeight(state, dtype).to(place.device)
    return weight
