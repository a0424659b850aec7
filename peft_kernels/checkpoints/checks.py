"""Finds faults in the tensors of a checkpoint: items of packed weights, and NaN or Inf in other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.formats import FORMATS
from ..nf4 import bitsandbytes_format, packed_format
from ..nf4.packed_format import METHOD
from .folder import Checkpoint
from .header import CheckpointError, Entry, shown
from .owned import owned_weights, owner_in, read_owned

_STATES = (f".{bitsandbytes_format.STATE_PREFIX}", *(f".{item}" for item in packed_format.STATE_ITEMS))
_ITEMS = {*bitsandbytes_format.TENSOR_ITEMS, *packed_format.TENSOR_ITEMS}
_OURS = tuple(f".{item}" for item in packed_format.STATE_ITEMS)
_OF_EXPERTS = tuple(f".{item}" for item in packed_format.EXPERTS_STATE_ITEMS)
_CHUNK = 1 << 24  # bytes of a tensor checked at a time


def weight_of(name: str) -> str | None:
    """The quantised weight that an item (`...weight.absmax`) belongs to; None for any other name."""
    for state in _STATES:
        if state in name:
            return name[: name.index(state)]
    weight, _, item = name.rpartition(".")
    return weight if item in _ITEMS and weight else None


def nf4_weights(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the quantised weights with their items."""
    found: dict[str, list[str]] = {}
    for name in names:
        weight = weight_of(name)
        if weight is not None:
            found.setdefault(weight, []).append(name)
    for weight, items in list(found.items()):
        # Unrelated tensors may be named absmax.
        known = weight in names or weight.endswith("weight")
        if not known and not any(state in item for item in items for state in _STATES):
            del found[weight]
    items_of = {
        weight: dict.fromkeys([weight] * (weight in names) + items) for weight, items in found.items()
    }
    for name in names:
        above = name.rpartition(".")[0]
        if name not in items_of and above in items_of:  # perhaps an unknown key
            items_of[above][name] = None
    return {weight: list(items) for weight, items in items_of.items()}


def holds_experts(names: Iterable[str]) -> bool:
    """Whether items of a packed weight are those of experts."""
    return any(name.endswith(_OF_EXPERTS) for name in names)


def is_ours(names: Iterable[str]) -> bool:
    """Whether a packed weight is in `packed_format`, which only this package reads."""
    return any(name.endswith(_OURS) for name in names)


def kind_of(names: Iterable[str]) -> str:
    """NF4 or FP4, if the names of a packed weight's items tell it, else "packed"."""
    for name in names:
        kind = name.rpartition(bitsandbytes_format.STATE_PREFIX)[2]
        if kind in bitsandbytes_format.QUANT_TYPES:
            return kind.upper()
    return "packed" if is_ours(names) else "NF4"


def read_nf4(checkpoint: Checkpoint, weight: str, names: list[str], codes: bool = True) -> Any:
    """(PackedState, dtype) of a weight. `codes=False` skips the codes, of which any value is valid in 4 bits.
    Raises CheckpointError for an item that does not fit."""
    items: dict[str, Tensor] = {}
    for name in names:
        entry = checkpoint.entries[name]
        if name == weight and not codes:
            items[name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        else:
            items[name] = entry.read()
    try:
        return packed_format.read(items, weight)
    except ValueError as error:
        raise CheckpointError(shown(str(error)) if "\n" in str(error) else str(error)) from error


def faults(
    checkpoint: Checkpoint, values: bool = True, seen: Callable[[int], None] = lambda nbytes: None
) -> Iterator[str]:
    """Yields a message for each fault of files, index, packed weights and configuration.

    Parameters
    ----------
    values : bool
        Also check unquantised tensors for NaN and Inf, which reads them.
    seen : callable
        Called with the bytes of each checked tensor.
    """
    yield from checkpoint.faults
    quantised = nf4_weights(checkpoint.entries)
    for weight, names in quantised.items():
        try:
            state, _ = read_nf4(checkpoint, weight, names, codes=False)
            if values and FORMATS[state.format].has_nan:
                read_nf4(checkpoint, weight, names)
        except CheckpointError as error:
            yield str(error)
        seen(sum(checkpoint.entries[name].nbytes for name in names))
    owned = owned_weights(checkpoint)
    for weight, names in owned.items():
        try:
            read_owned(checkpoint, weight, names)
        except CheckpointError as error:
            yield str(error)
        seen(sum(checkpoint.entries[name].nbytes for name in names))
    if values:
        items = {name for names in (*quantised.values(), *owned.values()) for name in names}
        for name, entry in checkpoint.entries.items():
            if name not in items:
                fault = _not_finite(entry)
                if fault is not None:
                    yield fault
                seen(entry.nbytes)
    owner = owner_in(checkpoint.config)
    if owner is not None and not owned:
        yield f"config.json: expected weights in {owner.title}, as its quantization_config says, got none"
    yield from _faults_of_config(checkpoint, quantised)


def finite_pieces(entry: Entry) -> Iterator[bytes]:
    """Yields the bytes of a tensor, and raises CheckpointError at the end if there was NaN or Inf."""
    floating = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
    bad = 0
    for data in entry.pieces(_CHUNK):
        if floating:
            values = torch.frombuffer(bytearray(data), dtype=entry.dtype)
            # A sum is finite only if every term is. It may overflow; then all values are checked.
            if not bool(torch.isfinite(values.sum(dtype=torch.float32))):
                bad += int((~torch.isfinite(values)).sum())
        yield data
    if bad:
        count = entry.nbytes // entry.dtype.itemsize
        raise CheckpointError(f"{shown(entry.name)}: {bad} of {count} values are NaN or Inf")


def _not_finite(entry: Entry) -> str | None:
    try:
        for _ in finite_pieces(entry):
            pass
    except CheckpointError as error:
        return str(error)
    return None


def quantised_otherwise(config: Mapping[str, Any]) -> str:
    """The quantisation method in config.json if it is not NF4, or the format's title; else ""."""
    owner = owner_in(config)
    if owner is not None:
        return owner.title
    found = config.get("quantization_config")
    if not found:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method == METHOD or (
        four_bits(found) and found.get("bnb_4bit_quant_type") in bitsandbytes_format.QUANT_TYPES
    ):
        return ""
    return shown(method or "an unknown method")


def four_bits(config: Any) -> bool:
    return isinstance(config, dict) and (
        bool(config.get("load_in_4bit")) or config.get("quant_method") == METHOD
    )


def _faults_of_config(checkpoint: Checkpoint, quantised: dict[str, list[str]]) -> Iterator[str]:
    if not checkpoint.path.is_dir():
        return
    config = checkpoint.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    ours = [names for names in quantised.values() if is_ours(names)]
    if quantised and not four_bits(config):
        kinds = {kind_of(names) for names in quantised.values()}
        kind = kinds.pop() if len(kinds) == 1 else "packed"
        yield (
            f"config.json: expected a quantization_config of {'peft_kernels' if ours else 'bitsandbytes'} "
            f"for the {kind} weights, got none; transformers would take them for ordinary tensors"
        )
    elif ours and method != METHOD:
        what = "experts" if all(map(holds_experts, ours)) else "weights"
        yield f"config.json: expected quant_method {METHOD} for the packed {what}, got {shown(method)}"
    if four_bits(config) and not quantised:
        yield "config.json: expected packed weights, as its quantization_config says, got none"
