"""Weights of a checkpoint that is packed in the format of another library, see `nf4.owners`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ..core.formats import FORMATS
from ..core.packed_state import PackedState
from ..nf4.owners import Owner, owner_of
from ..nf4.owners.stacked import joined
from .folder import Checkpoint
from .header import CheckpointError, shown

if TYPE_CHECKING:
    from ..quantize.transformers.stacking import Stack


def owner_in(config: Mapping[str, Any]) -> Owner | None:
    """The owner of the format that a config.json names; None if it is none of them, or in a variant that
    cannot be read."""
    found = config.get("quantization_config")
    try:
        return owner_of(found) if isinstance(found, dict) else None
    except ValueError:
        return None


def owned_weights(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Names of the packed weights, with their tensors; also of those that lack the tensors that mark them."""
    owner, entries = owner_in(checkpoint.config), checkpoint.entries
    if owner is None:
        return {}
    found = owner.weights(entries)
    for name, entry in entries.items():
        module, _dot, part = name.rpartition(".")
        weight = f"{module}.weight"
        if weight not in found and _is_part(owner, part, entry.dtype):
            stem = owner.stem(weight)
            names = (stem + part for part in dict.fromkeys((*owner.parts, *owner.beside)))
            found[weight] = [each for each in names if each in entries]
    return found


def _is_part(owner: Owner, part: str, dtype: torch.dtype) -> bool:
    """Whether only packed weights of layers have a tensor like this."""
    if part == "weight":
        codes = dtype == torch.uint8 and owner.codes == part
        return codes or dtype in (torch.float8_e4m3fn, FORMATS[owner.format].code_dtype)
    return part in owner.parts


def read_owned(checkpoint: Checkpoint, weight: str, names: list[str], headers: bool = False) -> PackedState:
    """A packed weight, without its codes if any value of them is valid; with `headers` on the meta device:
    then only tensors of one number are read. Raises CheckpointError for a tensor that does not fit."""
    owner, tensors = owner_in(checkpoint.config), {}
    assert owner is not None
    for name in names:
        entry = checkpoint.entries[name]
        part = owner.part_of(weight, name)
        unread = part == owner.codes and owner.any_code
        if unread or (headers and prod(entry.shape) > 1):
            tensors[part] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        else:
            tensors[part] = entry.read()
    with checkpoint_errors():
        return owner.read(tensors, weight)[0]


def owned_stacks(checkpoint: Checkpoint, model: Any) -> dict[str, Stack]:
    """Packed layers that are experts in the model, by the name of their weight there. Raises CheckpointError
    for a tensor that is missing among them, or is damaged."""
    owner = owner_in(checkpoint.config)
    if owner is None or owner.experts:
        return {}
    from ..quantize.transformers.stacking import stacks_of

    with checkpoint_errors():
        return stacks_of(model, checkpoint.entries, owner)


def joined_stack(stack: Stack, name: str, layers: Mapping[str, PackedState]) -> PackedState:
    """One weight of experts, of its layers by name. Raises CheckpointError for layers that do not fit."""
    with checkpoint_errors():
        return joined(stack.of(layers), len(stack.weights), name)


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Turns errors of owners' formats into CheckpointErrors."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(shown(str(error)) if "\n" in str(error) else str(error)) from error
