"""The state of a parameter in bitsandbytes' layout: sizes, and checks of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core.code_tables import dynamic_map, is_dynamic_map, moment_values
from ..ops.optim import STATE_BLOCK, write_moment

WRAPPED = "__bnb_optimizer_quant_state__"
"""Key under which bitsandbytes >= 0.49 nests tensors that FSDP must not gather."""

Copied = Callable[[Tensor, str, Tensor, torch.dtype], Tensor]
"""copied(parameter, name, value, dtype): a copy of a state tensor on the device where it belongs."""


def moment_names(lion: bool) -> tuple[int, ...]:
    """The numbers of state1, state2."""
    return (1,) if lion else (1, 2)


def blocks_of(shape: Sequence[int]) -> int:
    """Number of absmax values of a moment of this shape."""
    return -(-prod(shape) // STATE_BLOCK)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as rows and their length."""
    return (shape[0], prod(shape[1:])) if len(shape) > 0 else (1, 1)


def table_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of absmax in checkpoints of DTensors: for each row the scales of the blocks that it is in,
    and before them the position of its first element in the first block, unless all rows are whole blocks. It
    is sharded along rows like the parameter, and the same for any number of shards."""
    rows, length = _rows(shape)
    if length % STATE_BLOCK == 0:
        return rows, length // STATE_BLOCK
    return rows, 1 + (length + STATE_BLOCK - 2) // STATE_BLOCK + 1


def to_table(absmax: Tensor, shape: Sequence[int]) -> Tensor:
    """The table of a tensor in blocks."""
    (rows, length), (_, columns) = _rows(shape), table_shape(shape)
    if length % STATE_BLOCK == 0:
        return absmax.view(rows, columns)
    start = torch.arange(rows, device=absmax.device)[:, None] * length
    block = start // STATE_BLOCK + torch.arange(columns - 1, device=absmax.device)
    return torch.cat([start % STATE_BLOCK, absmax[block.clamp(max=blocks_of(shape) - 1)]], 1)


def in_own_blocks(entry: Mapping[str, Any], shape: Sequence[int], what: str) -> dict[str, Any]:
    """A parameter's state whose absmax may be a table of the rows of `shape`, with absmax of blocks."""
    found = dict(entry)
    for i in (1, 2):
        table, codes = found.get(f"absmax{i}"), found.get(f"state{i}")
        if not (isinstance(table, Tensor) and tuple(table.shape) == table_shape(shape)):
            continue
        if isinstance(codes, Tensor) and codes.dtype == torch.uint8:
            found[f"state{i}"], found[f"absmax{i}"] = _from_table(codes, table, i == 1, f"{what}: absmax{i}")
    return found


def _from_table(codes: Tensor, table: Tensor, signed: bool, what: str) -> tuple[Tensor, Tensor]:
    """The codes and absmax of a tensor in blocks of its own, from a table of rows that may have been in
    others; the same codes if the blocks are."""
    rows, length = _rows(codes.shape)
    if length % STATE_BLOCK == 0:
        return codes, table.reshape(-1)
    first, scales, device = table[:, :1], table[:, 1:], table.device
    if not bool(((first >= 0) & (first < STATE_BLOCK) & (first == first.floor())).all()):
        raise ValueError(f"{what}: expected positions in blocks in the first column, got other numbers")
    first = first.long()
    start = torch.arange(rows, device=device)[:, None] * length
    blocks = torch.arange(blocks_of(codes.shape), device=device) * STATE_BLOCK
    row = blocks // length
    if torch.equal(first, start % STATE_BLOCK):
        return codes, scales[row, (first[row, 0] + blocks - row * length) // STATE_BLOCK]
    scale = scales.gather(1, (first + torch.arange(length, device=device)) // STATE_BLOCK)
    values = moment_values(device, signed)[codes.to(device).long().view(rows, length)] * scale
    codes, absmax = torch.empty_like(codes, device=device), table.new_empty(len(blocks))
    write_moment(values.view(-1), values.view(-1).isfinite(), codes, absmax, signed)
    return codes, absmax


def unwrapped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state in a checkpoint, flattened (bitsandbytes >= 0.49 nests it)."""
    flat = dict(entry)
    flat.update(flat.pop(WRAPPED, {}))
    return flat


def checked(
    entry: Mapping[str, Any], parameter: Tensor, what: str, lion: bool, copied: Copied
) -> dict[str, Any]:
    """A parameter's state as a step takes it, sharing no memory with the checkpoint. Raises ValueError for
    what does not fit."""
    missing = [name for name in ("step", *(f"state{i}" for i in moment_names(lion))) if name not in entry]
    if missing:
        raise ValueError(
            f"{what}: its state has no {', '.join(missing)}; has {', '.join(map(str, entry)) or 'nothing'}"
        )
    found = dict(entry)
    device = parameter.device
    for i in moment_names(lion):
        name = f"state{i}"
        state = _tensor(entry, name, what)
        if state.shape != parameter.shape:
            expected, got = tuple(parameter.shape), tuple(state.shape)
            raise ValueError(f"{what}: {name}: expected shape {expected} like the parameter, got {got}")
        if state.dtype == torch.uint8:
            found[name] = copied(parameter, name, state, torch.uint8)
            found[f"absmax{i}"] = _absmax(entry, i, parameter, what)
            found[f"qmap{i}"] = _qmap(entry, i, device, what)
        elif state.is_floating_point():
            found[name] = copied(parameter, name, state, torch.float32)
        else:
            raise ValueError(f"{what}: {name}: expected uint8 or float32, got {state.dtype}")
    if len({found[f"state{i}"].dtype for i in moment_names(lion)}) > 1:
        raise ValueError(f"{what}: state1 and state2: expected both in 8 bits or both in 32, got one of each")
    found["step"] = _step(entry, what)
    return found


def _step(entry: Mapping[str, Any], what: str) -> int:
    step = entry["step"]
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(value, int | float) or not 0 <= value < 2**63 or value != int(value):
        raise ValueError(f"{what}: step: expected a whole number of at least 0, got {value}")
    return int(value)


def _absmax(entry: Mapping[str, Any], i: int, parameter: Tensor, what: str) -> Tensor:
    absmax, blocks = _tensor(entry, f"absmax{i}", what), blocks_of(parameter.shape)
    if absmax.numel() != blocks:
        size = -(-parameter.numel() // max(absmax.numel(), 1))
        raise ValueError(
            f"{what}: absmax{i}: expected {blocks} values, one for each {STATE_BLOCK} elements, got "
            f"{absmax.numel()}: these are states in blocks of about {size}"
        )
    if not absmax.is_floating_point():
        raise ValueError(f"{what}: absmax{i}: expected float32, got {absmax.dtype}")
    found = absmax.reshape(-1).to(parameter.device, torch.float32, copy=True)
    if bad := int((~((found >= 0) & found.isfinite())).sum()):
        raise ValueError(
            f"{what}: absmax{i}: expected finite numbers of at least 0, got {bad} of {blocks} that are not"
        )
    return found


def _qmap(entry: Mapping[str, Any], i: int, device: torch.device, what: str) -> Tensor:
    if not is_dynamic_map(_tensor(entry, f"qmap{i}", what), signed=i == 1):
        kind = "signed" if i == 1 else "unsigned"
        raise ValueError(f"{what}: qmap{i}: expected the {kind} dynamic map, got another one")
    return dynamic_map(device, signed=i == 1)


def _tensor(entry: Mapping[str, Any], name: str, what: str) -> Tensor:
    value = entry.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{what}: {name}: expected a tensor, got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(f"{what}: {name}: expected a tensor with data, got one on device meta")
    return value
