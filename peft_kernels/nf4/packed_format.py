"""The state-dict format of packed weights for which bitsandbytes has none: experts, and formats other than
NF4 and FP4.

One item holds the codes, for experts (experts, bytes), others the scales. Readers of bitsandbytes' format or
of dense weights reject its keys and shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.formats import FORMATS
from ..core.nf4_state import NF4State, packed_rows
from . import bitsandbytes_format
from .bitsandbytes_format import QUANT_TYPES, expect

_NF4_EXPERTS = "quant_state.peft_kernels__nf4_experts"
_EXPERTS = "quant_state.peft_kernels__packed_experts"  # in other formats
_LAYER = "quant_state.peft_kernels__packed"
EXPERTS_STATE_ITEMS = (_NF4_EXPERTS, _EXPERTS)
STATE_ITEMS = (*EXPERTS_STATE_ITEMS, _LAYER)
TENSOR_ITEMS = ("absmax", "nested_absmax", "nested_offset", "scale_values")
"""Items beside the codes: the second and third with double quantisation, the last where scales are codes."""


def holds(state: NF4State) -> bool:
    """Whether a weight is saved in this format."""
    return len(state.shape) == 3 or state.format not in QUANT_TYPES


def state_item(shape: tuple[int, ...], format: str) -> str:
    if len(shape) == 2:
        return _LAYER
    return _NF4_EXPERTS if format == "nf4" else _EXPERTS


def to_state_dict(state: NF4State, dtype: torch.dtype, key: str) -> dict[str, Tensor]:
    """Items of a packed weight, the codes under `key`; a dense weight is one plain tensor."""
    if state.dense is not None:
        return {key: state.dense}
    items = tensors(state, key)
    blob = list(description(state.shape, state.blocksize, dtype, state.format))
    item = f"{key}.{state_item(state.shape, state.format)}"
    return items | {item: torch.tensor(blob, dtype=torch.uint8, device=items[key].device)}


def tensors(state: NF4State, key: str) -> dict[str, Tensor]:
    """The items except for the description. For one expert, (out, in), its row of each."""
    assert state.packed is not None and state.absmax is not None
    items = {key: state.packed.view(*state.shape[:-2], -1), f"{key}.absmax": state.absmax}
    if state.offset is not None and state.absmax2 is not None:
        items |= {f"{key}.nested_absmax": state.absmax2, f"{key}.nested_offset": state.offset}
    elif state.absmax2 is not None:  # weights may share it, which writers of files refuse
        items[f"{key}.scale_values"] = state.absmax2.clone()
    return items


def description(shape: tuple[int, ...], blocksize: int, dtype: torch.dtype, format: str) -> bytes:
    """The JSON in the item of the state."""
    numbers = {
        "quant_type": format,
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    return json.dumps(numbers).encode()


def read(state_dict: Mapping[str, Any], key: str) -> tuple[NF4State, torch.dtype]:
    """`from_state_dict` of the format in which `key` is stored, this one or bitsandbytes'."""
    if any(f"{key}.{item}" in state_dict for item in STATE_ITEMS):
        return from_state_dict(state_dict, key)
    return bitsandbytes_format.from_state_dict(state_dict, key)


def from_state_dict(state_dict: Mapping[str, Any], key: str) -> tuple[NF4State, torch.dtype]:
    """The weights saved under `key` and their nominal dtype. Raises ValueError for an item that is missing,
    truncated, unknown, or has impossible values."""
    known = {name: f"{key}.{name}" for name in TENSOR_ITEMS}
    state_item = next(item for item in STATE_ITEMS if f"{key}.{item}" in state_dict)
    blob_key, with_experts = f"{key}.{state_item}", state_item in EXPERTS_STATE_ITEMS
    foreign = next(
        (n for n in state_dict if n.startswith(f"{key}.") and n not in (*known.values(), blob_key)), None
    )
    if foreign is not None:
        raise ValueError(f"{foreign}: expected the items of a packed weight alone, got this key beside them")
    blob = _item(state_dict, blob_key)
    kinds = ("nf4",) if state_item == _NF4_EXPERTS else tuple(kind for kind in FORMATS if kind != "nf4")
    numbers = bitsandbytes_format.read_json(blob_key, blob, kinds)
    shape, format = numbers.shape, numbers.quant_type
    if len(shape) != 2 + with_experts or (with_experts and shape[0] < 1):
        expected = "(experts, out_features, in_features)" if with_experts else "(out_features, in_features)"
        raise ValueError(f"{key}: expected a shape {expected}, got {bitsandbytes_format.short(shape)}")
    nested = known["nested_absmax"] in state_dict or known["nested_offset"] in state_dict
    by_code = FORMATS[format].scale != "absmax"
    names = ["nested_absmax", "nested_offset"] if nested else ["scale_values"] if by_code else []
    codes, absmax, *second = (
        _item(state_dict, name) for name in (key, *(known[n] for n in ("absmax", *names)))
    )
    expect(key, "dtype", torch.uint8, codes.dtype)
    if nested:
        expect(known["nested_offset"], "dtype", torch.float32, second[1].dtype)
    if len(shape) == 3:
        items = dict(zip((key, "absmax", *names), (codes, absmax, *second), strict=True))
        for (name, tensor), n in zip(items.items(), (2, 2, 2, 1), strict=False):
            expect(known.get(name, name), "number of dimensions", n, tensor.dim())
            expect(known.get(name, name), "number of experts", shape[0], tensor.shape[0])
    # Experts have equal sizes, so checking the first is enough.
    first = (lambda t: t[0]) if len(shape) == 3 else (lambda t: t)
    one = bitsandbytes_format.assemble(
        key,
        shape[-2:],
        numbers.blocksize,
        numbers.dtype,
        first(codes),
        first(absmax),
        first(second[0]) if second else None,
        first(second[1]) if nested else None,
        format,
    )
    if len(shape) == 2:
        state = one
    else:
        state = NF4State(
            shape,
            one.blocksize,
            packed_rows(codes.detach().contiguous(), shape),
            (absmax if second else absmax.float()).contiguous(),
            second[0].float().contiguous() if second else None,
            second[1] if nested else None,
            double_quant=nested,
            format=format,
        )
    largest = 0.0
    if nested and second[1].device.type != "meta":
        offsets = second[1]
        largest = float(offsets.max())
        good = (offsets >= 0) & (offsets <= torch.finfo(torch.float32).max)
        if not bool(good.all()):
            bad = int((~good).sum())
            raise ValueError(
                f"{known['nested_offset']}: expected finite numbers of 0 or more, got {bad} others"
            )
    bitsandbytes_format.check_scales(key, state, largest)
    return state, numbers.dtype


def _item(state_dict: Mapping[str, Any], name: str) -> Tensor:
    value = state_dict.get(name)
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor in the state dict, got {type(value).__name__}")
    return value
