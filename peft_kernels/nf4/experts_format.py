"""The state-dict format of packed experts, for which bitsandbytes has none.

One item holds the codes of all experts, (experts, bytes), others their scales, (experts, blocks). Readers of
bitsandbytes' format or of dense weights reject its keys and shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.nf4_state import NF4State, packed_rows
from . import bitsandbytes_format
from .bitsandbytes_format import expect

STATE_ITEM = "quant_state.peft_kernels__nf4_experts"
TENSOR_ITEMS = ("absmax", "nested_absmax", "nested_offset")
"""Items beside the codes, the last two with double quantisation."""


def to_state_dict(state: NF4State, dtype: torch.dtype, key: str) -> dict[str, Tensor]:
    """Items of a packed weight, the codes under `key`; a dense weight is one plain tensor."""
    if state.dense is not None:
        return {key: state.dense}
    items = tensors(state, key)
    blob = list(description(state.shape, state.blocksize, dtype))
    device = items[key].device
    return items | {f"{key}.{STATE_ITEM}": torch.tensor(blob, dtype=torch.uint8, device=device)}


def tensors(state: NF4State, key: str) -> dict[str, Tensor]:
    """The items except for the description. For one expert, (out, in), its row of each."""
    assert state.packed is not None and state.absmax is not None
    items = {key: state.packed.view(*state.shape[:-2], -1)}
    for name, tensor in zip(TENSOR_ITEMS, (state.absmax, state.absmax2, state.offset), strict=True):
        if tensor is not None:
            items[f"{key}.{name}"] = tensor
    return items


def description(shape: tuple[int, ...], blocksize: int, dtype: torch.dtype) -> bytes:
    """The JSON in the item STATE_ITEM."""
    numbers = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    return json.dumps(numbers).encode()


def read(state_dict: Mapping[str, Any], key: str) -> tuple[NF4State, torch.dtype]:
    """`from_state_dict` of the format in which `key` is stored, this one or bitsandbytes'."""
    if f"{key}.{STATE_ITEM}" in state_dict:
        return from_state_dict(state_dict, key)
    return bitsandbytes_format.from_state_dict(state_dict, key)


def from_state_dict(state_dict: Mapping[str, Any], key: str) -> tuple[NF4State, torch.dtype]:
    """The weights saved under `key` and their nominal dtype. Raises ValueError for an item that is missing,
    truncated, unknown, or has impossible values."""
    known = {name: f"{key}.{name}" for name in (*TENSOR_ITEMS, STATE_ITEM)}
    foreign = next((n for n in state_dict if n.startswith(f"{key}.") and n not in known.values()), None)
    if foreign is not None:
        raise ValueError(f"{foreign}: expected the items of NF4 experts alone, got this key beside them")
    nested = known["nested_absmax"] in state_dict or known["nested_offset"] in state_dict
    wanted = [key, known["absmax"], known[STATE_ITEM]]
    wanted += [known["nested_absmax"], known["nested_offset"]] if nested else []
    found: list[Tensor] = []
    for name in wanted:
        value = state_dict.get(name)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor in the state dict, got {type(value).__name__}")
        found.append(value)
    codes, absmax, blob, *second = found
    numbers = bitsandbytes_format.read_json(known[STATE_ITEM], blob)
    shape = numbers.shape
    if len(shape) != 3 or shape[0] < 1:
        got = bitsandbytes_format.short(shape)
        raise ValueError(f"{key}: expected a shape (experts, out_features, in_features), got {got}")
    expect(key, "dtype", torch.uint8, codes.dtype)
    dimensions = [2, 2, 2, 1]  # (experts, n), and one value each
    parts = zip([key, *wanted[1:2], *wanted[3:]], [codes, absmax, *second], dimensions, strict=False)
    for name, tensor, n in parts:
        expect(name, "number of dimensions", n, tensor.dim())
        expect(name, "number of experts", shape[0], tensor.shape[0])
    offsets = second[1] if nested else None
    if offsets is not None:
        expect(known["nested_offset"], "dtype", torch.float32, offsets.dtype)
    # Experts have equal sizes, so checking the first is enough.
    one = bitsandbytes_format.assemble(
        key,
        shape[1:],
        numbers.blocksize,
        numbers.dtype,
        codes[0],
        absmax[0],
        second[0][0] if nested else None,
        None if offsets is None else offsets[0],
    )
    state = NF4State(
        shape,
        one.blocksize,
        packed_rows(codes.detach().contiguous(), shape),
        (absmax if nested else absmax.float()).contiguous(),
        second[0].float().contiguous() if nested else None,
        offsets,
        double_quant=nested,
    )
    largest = 0.0
    if offsets is not None and offsets.device.type != "meta":
        largest = float(offsets.max())
        good = (offsets >= 0) & (offsets <= torch.finfo(torch.float32).max)
        if not bool(good.all()):
            bad = int((~good).sum())
            raise ValueError(
                f"{known['nested_offset']}: expected finite numbers of 0 or more, got {bad} others"
            )
    bitsandbytes_format.check_scales(key, state, largest)
    return state, numbers.dtype
