"""Weights of a checkpoint that is packed in the format of another library, see `nf4.owners`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ..core.nf4_state import NF4State
from ..nf4.owners import Owner, owner_of
from .folder import Checkpoint
from .header import CheckpointError, shown


def owner_in(config: Mapping[str, Any]) -> Owner | None:
    """The owner of the format that a config.json names; None if it is none of them, or in a variant that
    cannot be read."""
    found = config.get("quantization_config")
    try:
        return owner_of(found) if isinstance(found, dict) else None
    except ValueError:
        return None


def owned_weights(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Names of the packed weights, with their tensors."""
    owner, names = owner_in(checkpoint.config), checkpoint.entries
    if owner is None:
        return {}
    marked = dict.fromkeys(weight for name in names if (weight := owner.weight_of(name)) is not None)
    return {weight: owner.tensors_of(weight, names) for weight in marked}


def read_owned(checkpoint: Checkpoint, weight: str, names: list[str], headers: bool = False) -> NF4State:
    """A packed weight without its codes, of which any value is valid; with `headers` on the meta device, and
    only tensors of one number are read. Raises CheckpointError for a tensor that does not fit."""
    owner, tensors = owner_in(checkpoint.config), {}
    assert owner is not None
    for name in names:
        entry = checkpoint.entries[name]
        ending = owner.ending_of(weight, name)
        if ending == owner.codes or (headers and prod(entry.shape) > 1):
            tensors[ending] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        else:
            tensors[ending] = entry.read()
    try:
        return owner.read(tensors, weight)[0]
    except ValueError as error:
        raise CheckpointError(shown(str(error)) if "\n" in str(error) else str(error)) from error
