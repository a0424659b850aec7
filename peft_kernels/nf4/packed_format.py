"""The state-dict format of packed weights for which bitsandbytes has none: experts, and formats other than
NF4 and FP4.

One item holds the codes, for experts (experts, bytes), others the scales. Readers of bitsandbytes' format or
of dense weights reject its keys and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.formats import FORMATS
from ..core.packed_state import PackedState, packed_rows
from . import bitsandbytes_format
from .assembly import assemble, check_scales, expect, short
from .bitsandbytes_format import QUANT_TYPES, description

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


def holds(state: PackedState) -> bool:
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


def to_state_dict(state: PackedState, dtype: torch.dtype, key: str) -> dict[str, Tensor]:
    """Items of a packed weight, the codes under `key`; a dense weight is one plain tensor."""
    if state.dense is not None:
        return {key: state.dense}
    items = tensors(state, key)
    blob = list(description(state.shape, state.blocksize, dtype, state.format))
    item = f"{key}.{state_item(state.shape, state.format)}"
    return items | {item: torch.tensor(blob, dtype=torch.uint8, device=items[key].device)}


def tensors(state: PackedState, key: str) -> dict[str, Tensor]:
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


def read(state_dict: Mapping[str, Any], key: str) -> tuple[PackedState, torch.dtype]:
    """`from_state_dict` of the format in which `key` is stored, this one or bitsandbytes'."""
    if any(f"{key}.{item}" in state_dict for item in STATE_ITEMS):
        return from_state_dict(state_dict, key)
    return bitsandbytes_format.from_state_dict(state_dict, key)


def from_state_dict(state_dict: Mapping[str, Any], key: str) -> tuple[PackedState, torch.dtype]:
    """The weights saved under `key` and their nominal dtype. Raises ValueError for an item that is missing,
    truncated, unknown, or has impossible values."""
    numbers = _description_of(state_dict, key)
    shape, format = numbers.shape, numbers.quant_type
    names = _names(state_dict, key, format)
    tensors: Any = [name and _item(state_dict, name) for name in names]
    expect(key, "dtype", torch.uint8, tensors[0].dtype)
    nested, offset = names[3] == f"{key}.nested_offset", tensors[3]
    if nested:
        expect(f"{key}.nested_offset", "dtype", torch.float32, offset.dtype)
    experts = len(shape) == 3
    for name, tensor in zip(names, tensors, strict=True):
        if experts and name is not None:
            dims = 1 if nested and tensor is offset else 2
            expect(name, "number of dimensions", dims, tensor.dim())
            expect(name, "number of experts", shape[0], tensor.shape[0])
    # Experts have equal sizes, so checking the first is enough.
    one: Any = [tensor[0] if experts and tensor is not None else tensor for tensor in tensors]
    codes, absmax, absmax2, first = one
    state = assemble(key, shape[-2:], numbers.blocksize, numbers.dtype, codes, absmax, absmax2, first, format)
    if experts:
        codes, absmax, absmax2, _ = tensors
        state = replace(
            state,
            shape=shape,
            packed=packed_rows(codes.detach().contiguous(), shape, FORMATS[format].bits),
            absmax=absmax.to(state.absmax).contiguous(),
            absmax2=None if absmax2 is None else absmax2.float().contiguous(),
            offset=offset,
        )
    largest = 0.0
    if nested and offset.device.type != "meta":
        largest = float(offset.max())
        good = (offset >= 0) & (offset <= torch.finfo(torch.float32).max)
        if bad := int((~good).sum()):
            raise ValueError(f"{key}.nested_offset: expected finite numbers of 0 or more, got {bad} others")
    check_scales(key, state, largest)
    return state, numbers.dtype


def _description_of(state_dict: Mapping[str, Any], key: str) -> bitsandbytes_format.Numbers:
    """What the item of the state says. Raises ValueError if the weight has items of another format too."""
    state_item = next(item for item in STATE_ITEMS if f"{key}.{item}" in state_dict)
    known = {f"{key}.{name}" for name in (*TENSOR_ITEMS, state_item)}
    for name in state_dict:
        if name.startswith(f"{key}.") and name not in known:
            raise ValueError(f"{name}: expected the items of a packed weight alone, got this key beside them")
    kinds = ("nf4",) if state_item == _NF4_EXPERTS else tuple(kind for kind in FORMATS if kind != "nf4")
    name = f"{key}.{state_item}"
    numbers = bitsandbytes_format.read_json(name, _item(state_dict, name), kinds)
    dims = ("experts",) if state_item in EXPERTS_STATE_ITEMS else ()
    if len(numbers.shape) != 2 + len(dims) or (dims and numbers.shape[0] < 1):
        expected = ", ".join((*dims, "out_features", "in_features"))
        raise ValueError(f"{key}: expected a shape ({expected}), got {short(numbers.shape)}")
    return numbers


def _names(state_dict: Mapping[str, Any], key: str, format: str) -> list[str | None]:
    """The keys of the codes, the scales, the second scales and the offsets; None for those that the weight
    does not have. Raises ValueError for items of other formats."""
    present = [name for name in TENSOR_ITEMS if f"{key}.{name}" in state_dict]
    form, second, third = FORMATS[format], None, None
    if "nested_absmax" in present or "nested_offset" in present:
        second, third = "nested_absmax", "nested_offset"
    elif form.by_code:
        second = "scale_values"
    elif form.scale == "half" and "zero_points" in present:
        third = "zero_points"
    names = [key, *(name and f"{key}.{name}" for name in ("absmax", second, third))]
    for name in present:
        if f"{key}.{name}" not in names:
            expected = ", ".join(filter(None, names))
            raise ValueError(f"{key}.{name}: expected {expected} of {format}, got this key too")
    return names


def _item(state_dict: Mapping[str, Any], name: str) -> Tensor:
    value = state_dict.get(name)
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor in the state dict, got {type(value).__name__}")
    return value
