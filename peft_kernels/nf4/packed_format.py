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
from .assembly import assemble, check_scales, expect, short
from .bitsandbytes_format import QUANT_TYPES

METHOD = "peft_kernels_nf4"
"""`quant_method` of a configuration that only this package reads, and our method's name in transformers."""
_NF4_EXPERTS = "quant_state.peft_kernels__nf4_experts"
_EXPERTS = "quant_state.peft_kernels__packed_experts"  # in other formats
_LAYER = "quant_state.peft_kernels__packed"
EXPERTS_STATE_ITEMS = (_NF4_EXPERTS, _EXPERTS)
STATE_ITEMS = (*EXPERTS_STATE_ITEMS, _LAYER)
TENSOR_ITEMS = ("absmax", "nested_absmax", "nested_offset", "scale_values", "zero_points")
"""Items beside the codes: the second and third with double quantisation, the fourth where scales are codes,
the last where blocks of int4 have zero points."""
ITEMS = {*TENSOR_ITEMS, *STATE_ITEMS, *bitsandbytes_format.TENSOR_ITEMS, *bitsandbytes_format.STATE_ITEMS}
"""Items beside the codes in every format that `read` reads."""


def holds(state: NF4State) -> bool:
    """Whether a weight is saved in this format."""
    return len(state.shape) == 3 or state.format not in QUANT_TYPES


def configuration(
    blocksize: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
    dense: list[str] | None,
    experts: bool,
    format: str,
) -> dict[str, Any]:
    """A model's `quantization_config` for config.json. `dense` names the layers that are not quantised."""
    return {
        "quant_method": METHOD,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "modules_to_not_convert": dense,
        "compute_dtype": None if compute_dtype is None else str(compute_dtype).removeprefix("torch."),
        "experts": experts,
        "format": format,
    }


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
    elif state.offset is not None:
        items[f"{key}.zero_points"] = state.offset
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
        raise ValueError(f"{key}: expected a shape {expected}, got {short(shape)}")
    nested = known["nested_absmax"] in state_dict or known["nested_offset"] in state_dict
    form = FORMATS[format]
    absmax2_item = "nested_absmax" if nested else "scale_values" if form.by_code else None
    shifted = form.scale == "half" and known["zero_points"] in state_dict
    offset_item = "nested_offset" if nested else "zero_points" if shifted else None
    names = {"": key} | {n: known[n] for n in ("absmax", absmax2_item, offset_item) if n is not None}
    for name in known.values():
        if name in state_dict and name not in names.values():
            raise ValueError(f"{name}: expected {', '.join(names.values())} of {format}, got this key too")
    items = {name: _item(state_dict, item) for name, item in names.items()}
    expect(key, "dtype", torch.uint8, items[""].dtype)
    if nested:
        expect(known["nested_offset"], "dtype", torch.float32, items["nested_offset"].dtype)
    if len(shape) == 3:
        for name, tensor in items.items():
            expect(names[name], "number of dimensions", 1 if name == "nested_offset" else 2, tensor.dim())
            expect(names[name], "number of experts", shape[0], tensor.shape[0])
    codes, absmax = items[""], items["absmax"]
    absmax2 = None if absmax2_item is None else items[absmax2_item]
    offset = None if offset_item is None else items[offset_item]
    # Experts have equal sizes, so checking the first is enough.
    parts: Any = codes, absmax, absmax2, offset
    if len(shape) == 3:
        parts = tuple(None if part is None else part[0] for part in parts)
    one = assemble(
        key, shape[-2:], numbers.blocksize, numbers.dtype, parts[0], parts[1], parts[2], parts[3], format
    )
    if len(shape) == 2:
        state = one
    else:
        assert one.absmax is not None
        state = NF4State(
            shape,
            one.blocksize,
            packed_rows(codes.detach().contiguous(), shape, form.bits),
            absmax.to(one.absmax.dtype).contiguous(),
            None if absmax2 is None else absmax2.float().contiguous(),
            offset,
            double_quant=offset is not None,
            format=format,
        )
    largest = 0.0
    if nested and offset is not None and offset.device.type != "meta":
        offsets = offset
        largest = float(offsets.max())
        good = (offsets >= 0) & (offsets <= torch.finfo(torch.float32).max)
        if not bool(good.all()):
            bad = int((~good).sum())
            raise ValueError(
                f"{known['nested_offset']}: expected finite numbers of 0 or more, got {bad} others"
            )
    check_scales(key, state, largest)
    return state, numbers.dtype


def _item(state_dict: Mapping[str, Any], name: str) -> Tensor:
    value = state_dict.get(name)
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor in the state dict, got {type(value).__name__}")
    return value
