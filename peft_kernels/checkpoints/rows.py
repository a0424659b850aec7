"""Reads rows of a checkpoint's tensors, for one of several processes."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core.formats import FORMATS
from ..core.packed_state import PackedState
from ..nf4 import bitsandbytes_format, packed_format
from ..nf4.assembly import check_scales
from ..nf4.sharded.local_rows import LocalRows
from ..nf4.sharded.partition import Partition
from .folder import Checkpoint
from .header import CheckpointError, Entry


def read_rows(entry: Entry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a plain tensor; reads only these."""
    row = prod(entry.shape[1:])
    return _flat(entry, start * row, stop * row).view(stop - start, *entry.shape[1:])


def read_layout(checkpoint: Checkpoint, weight: str, names: list[str]) -> tuple[PackedState, torch.dtype]:
    """A packed weight and its nominal dtype, with codes, first-level scales and zero points on the meta
    device. Raises CheckpointError for an item that does not fit."""
    items: dict[str, Tensor] = {}
    for name in names:
        entry = checkpoint.entries[name]
        large = name in (weight, f"{weight}.absmax", f"{weight}.zero_points")
        items[name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta") if large else entry.read()
    try:
        state, dtype = packed_format.read(items, weight)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    state.name = weight
    # Stored as text; was created on the codes' device.
    if state.absmax2 is not None and state.offset is not None and state.offset.is_meta:
        key = f"{weight}.{bitsandbytes_format.STATE_PREFIX}{state.format}"
        numbers = bitsandbytes_format.read_json(key, items[key], (state.format,))
        state.offset = torch.tensor(float(numbers.nested_offset))
    return state, dtype


def read_local_rows(
    checkpoint: Checkpoint, weight: str, state: PackedState, start: int, stop: int
) -> LocalRows:
    """Rows [start, stop) of a packed weight with the `state` of `read_layout`; reads only the blocks they
    touch. Errors as there."""
    form = FORMATS[state.format]
    partition = Partition(tuple(state.shape), state.blocksize, state.format)
    codes, scales = partition.slices(start, stop)
    packed = _flat(checkpoint.entries[weight], codes.start, codes.stop)
    absmax = _flat(checkpoint.entries[f"{weight}.absmax"], scales.start, scales.stop)
    offset = state.offset
    if form.scale == "half" and offset is not None:
        offset = _flat(checkpoint.entries[f"{weight}.zero_points"], scales.start, scales.stop)
    if offset is None or form.scale == "half":
        absmax = absmax if form.by_code or form.scale == "half" else absmax.float()
        checked: Any = replace(state, packed=packed, absmax=absmax, offset=offset)
        try:
            check_scales(weight, checked, 0.0)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return LocalRows(partition, start, stop, packed, absmax, state.absmax2, offset, weight)


def _flat(entry: Entry, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened tensor."""
    size = entry.dtype.itemsize
    part = replace(
        entry, shape=(stop - start,), begin=entry.begin + start * size, nbytes=(stop - start) * size
    )
    return part.read()
