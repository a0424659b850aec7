"""bitsandbytes' NF4 format: its checkpoint keys and its Params4bit. The library itself is optional."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.code_tables import NESTED_BLOCKSIZE, WEIGHT_DTYPES, dynamic_map, is_dynamic_map
from ..core.formats import FORMATS, code_values
from ..core.packed_state import PackedState
from .assembly import READ_SCALE_DTYPES, assemble, check_scales, expect, short

STATE_PREFIX = "quant_state.bitsandbytes__"  # then the quantisation type
QUANT_TYPES = ("nf4", "fp4")
STATE_ITEMS = tuple(f"{STATE_PREFIX}{kind}" for kind in QUANT_TYPES)
"""The item of a weight's JSON; which one it is tells the format."""
TENSOR_ITEMS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""Items beside the codes of a weight, the last two with double quantisation."""
BLOCKSIZE_KEY = "bnb_4bit_blocksize"  # our key in configurations
DEFAULT_BLOCKSIZE = 64  # bitsandbytes supports no other
_LONGEST_JSON = 1 << 16  # bytes; about 200 are used
_CPU = torch.device("cpu")
_OTHER_TABLE = "_peft_kernels_other_table"  # on a QuantState: what `reason_other_table` found


def to_state_dict(state: PackedState, dtype: torch.dtype, key: str) -> dict[str, Tensor]:
    """A weight under bitsandbytes' keys, the codes under `key`; a dense weight is one plain tensor."""
    if state.dense is not None:
        return {key: state.dense}
    assert state.packed is not None and state.absmax is not None
    device = state.packed.device
    items = {
        key: state.packed.view(-1, 1),
        f"{key}.absmax": state.absmax,
        f"{key}.quant_map": _code(state.format, device).clone(),
    }
    nested: dict[str, Any] = {}
    if state.absmax2 is not None and state.offset is not None:
        items[f"{key}.nested_absmax"] = state.absmax2
        items[f"{key}.nested_quant_map"] = dynamic_map(device).clone()
        offset = 0.0 if device.type == "meta" else state.offset.item()  # meta tensors have no data
        nested = {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
    blob = list(description(state.shape, state.blocksize, dtype, state.format, **nested))
    items[f"{key}.{STATE_PREFIX}{state.format}"] = torch.tensor(blob, dtype=torch.uint8, device=device)
    return items


def description(
    shape: tuple[int, ...], blocksize: int, dtype: torch.dtype, format: str, **nested: Any
) -> bytes:
    """The JSON in the item of a weight's state."""
    numbers = {"quant_type": format, "blocksize": blocksize, "dtype": _name(dtype), "shape": list(shape)}
    return json.dumps(numbers | nested).encode()


def from_state_dict(state_dict: Mapping[str, Any], key: str) -> tuple[PackedState, torch.dtype]:
    """The weight saved under `key` and its nominal dtype. Raises ValueError for an item that is missing,
    truncated, unknown, or has impossible values."""
    packed = _item(state_dict, key)
    mine = [name for name in state_dict if name.startswith(f"{key}.")]
    for name in mine:
        if name.startswith(f"{key}.quant_state.") and not name.endswith(STATE_ITEMS):
            raise ValueError(f"{name}: expected quantisation type nf4 or fp4, this checkpoint holds another")
    kind = next((kind for kind in QUANT_TYPES if f"{key}.{STATE_PREFIX}{kind}" in mine), QUANT_TYPES[0])
    state_item = f"{STATE_PREFIX}{kind}"
    numbers = read_json(f"{key}.{state_item}", _item(state_dict, f"{key}.{state_item}"), (kind,))
    nested = f"{key}.nested_absmax" in state_dict or numbers.nested_offset is not None
    known = {f"{key}.{name}" for name in (*TENSOR_ITEMS, state_item)}
    foreign = next((name for name in mine if name not in known), None)
    if foreign is not None:
        raise ValueError(
            f"{foreign}: expected the items of an {kind.upper()} weight alone, got this key beside them"
        )
    if nested:
        _check_nested(f"{key}.{state_item}", numbers)
        table = _item(state_dict, f"{key}.nested_quant_map")
        _expect_table(f"{key}.nested_quant_map", table, is_dynamic_map(table))
    table = _item(state_dict, f"{key}.quant_map")
    _expect_table(
        f"{key}.quant_map", table, torch.equal(_code(kind, _CPU), table.detach().float().cpu().view(-1))
    )
    absmax, absmax2, offset = _item(state_dict, f"{key}.absmax"), None, None
    if nested:
        absmax2 = _item(state_dict, f"{key}.nested_absmax")
        offset = torch.tensor(float(numbers.nested_offset), device=packed.device)
    shape, blocksize, dtype = numbers.shape, numbers.blocksize, numbers.dtype
    state = assemble(key, shape, blocksize, dtype, packed, absmax, absmax2, offset, kind)
    check_scales(key, state, numbers.nested_offset if nested else 0.0)
    if not nested and f"{key}.nested_quant_map" in state_dict:
        raise ValueError(f"{key}.nested_quant_map: expected nested_absmax beside it, got none")
    return state, dtype


def _item(state_dict: Mapping[str, Any], name: str) -> Tensor:
    value = state_dict.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor in the state dict, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}")
    return value


@dataclass(frozen=True)
class Numbers:
    """Contents of a weight's JSON; the nested_* fields are not checked."""

    shape: tuple[int, ...]
    blocksize: int
    dtype: Any
    nested_offset: Any
    nested_blocksize: Any
    nested_dtype: Any
    quant_type: str


def read_json(name: str, blob: Tensor, kinds: Sequence[str]) -> Numbers:
    """The numbers of a weight in one of the formats `kinds`."""
    expect(name, "dtype", torch.uint8, blob.dtype)
    if blob.numel() > _LONGEST_JSON:
        raise ValueError(f"{name}: expected bitsandbytes' JSON, got {blob.numel()} bytes")
    try:
        # Very long floats and deep nesting raise other errors than ValueError.
        numbers = json.loads(bytes(blob.view(-1).tolist()).decode())
        shape, blocksize, dtype = numbers["shape"], numbers["blocksize"], getattr(torch, numbers["dtype"])
        if not isinstance(shape, list):
            raise TypeError(f"shape {short(shape)}")
        if not all(_is_integer(n) for n in (*shape, blocksize)):
            raise TypeError(f"shape {short(shape)} and blocksize {short(blocksize)} are not integers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected bitsandbytes' JSON, got something else ({short(str(error))})"
        ) from error
    kind = numbers.get("quant_type")
    if kind not in kinds:
        raise ValueError(f"{name}: expected quant_type {' or '.join(kinds)}, got {short(kind)}")
    offset, nested_blocksize, nested_dtype = (
        numbers.get(f"nested_{what}") for what in ("offset", "blocksize", "dtype")
    )
    return Numbers(tuple(shape), blocksize, dtype, offset, nested_blocksize, nested_dtype, kind)


def _check_nested(name: str, numbers: Numbers) -> None:
    expect(name, "nested_blocksize", NESTED_BLOCKSIZE, numbers.nested_blocksize)
    if numbers.nested_dtype not in (None, *map(_name, WEIGHT_DTYPES)):
        raise ValueError(
            f"{name}: expected nested_dtype float32, bfloat16 or float16, got {short(numbers.nested_dtype)}"
        )
    offset = numbers.nested_offset
    if not isinstance(offset, (int, float)) or isinstance(offset, bool):
        raise ValueError(f"{name}: expected a number nested_offset, got {short(offset)}")
    if not 0 <= offset <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: expected a finite nested_offset of 0 or more, got {short(offset)}")


def configuration(
    blocksize: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
    dense: list[str] | None,
    kind: str = "nf4",
) -> dict[str, Any]:
    """A model's `quantization_config` for config.json, as transformers' BitsAndBytesConfig writes it. `dense`
    names the layers that are not quantised. Blocksizes other than bitsandbytes' use a key of our own."""
    numbers: dict[str, Any] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": _name(compute_dtype or torch.float32),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return numbers if blocksize == DEFAULT_BLOCKSIZE else numbers | {BLOCKSIZE_KEY: blocksize}


def reason_other_table(params4bit: Any) -> str | None:
    """Why the scales of a quantised Params4bit are not codes of the standard table, or None. Reads the table
    once, for which the host waits for a GPU, and not in a compiler, which has no values."""
    quant_state = params4bit.quant_state
    if not quant_state.nested:
        return None
    found = quant_state.__dict__.get(_OTHER_TABLE)
    if found is None and not torch.compiler.is_compiling() and not quant_state.state2.code.is_meta:
        code = quant_state.state2.code
        found = (
            ""
            if is_dynamic_map(code)
            else f"its scales have another table than the standard one{_of_old_cpus(code)}; quantise the "
            "dense weight again"
        )
        setattr(quant_state, _OTHER_TABLE, found)
    return found or None


def _of_old_cpus(code: Tensor) -> str:
    """bitsandbytes before 0.50 replaced the first value when it quantised on a CPU."""
    made_there = code.numel() == 256 and float(code.view(-1)[0]) == -1.0
    return ", as bitsandbytes before 0.50 made on CPUs" if made_there else ""


def is_quantized(params4bit: Any) -> bool:
    return getattr(params4bit, "quant_state", None) is not None and bool(
        getattr(params4bit, "bnb_quantized", False)
    )


def reason_unusable(params4bit: Any) -> str | None:
    """Why a Params4bit cannot be used in place, or None. Reads no data."""
    if not is_quantized(params4bit):
        return "the weight is not quantised yet; move it to its device first"
    quant_state = params4bit.quant_state
    if getattr(quant_state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes repacked the weight for CPU inference and rounded its scales; reload the checkpoint"
        )
    if quant_state.quant_type not in QUANT_TYPES:
        return f"quantisation type {quant_state.quant_type}, expected nf4 or fp4; quantise it to one of these"
    if len(quant_state.shape) != 2:
        return f"shape {tuple(quant_state.shape)}, expected two dimensions; nothing to do"
    if quant_state.nested and quant_state.state2.blocksize != NESTED_BLOCKSIZE:
        return f"nested blocksize {quant_state.state2.blocksize}, expected {NESTED_BLOCKSIZE}; nothing to do"
    return None


def state_of(params4bit: Any, name: str = "params4bit") -> PackedState:
    """The state of a quantised Params4bit, sharing memory. Raises ValueError if it cannot be used."""
    reason = reason_unusable(params4bit) or reason_other_table(params4bit)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    found = params4bit.quant_state
    absmax2, offset = (found.state2.absmax, found.offset) if found.nested else (None, None)
    tensors = params4bit.data, found.absmax, absmax2, offset
    return assemble(name, tuple(found.shape), found.blocksize, found.dtype, *tensors, found.quant_type)


def to_params4bit(state: PackedState, dtype: torch.dtype) -> Any:
    """A `bitsandbytes.nn.Params4bit` sharing memory with a weight. Raises ValueError for a dense weight."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    if state.dense is not None or state.packed is None or state.absmax is None:
        raise ValueError(
            "weight: expected packed values, got a weight made dense by a write (call requantize_())"
        )
    if state.format not in QUANT_TYPES:
        raise ValueError(f"weight: expected the format nf4 or fp4, got {state.format}")
    device, nested, second = state.packed.device, state.absmax2 is not None, None
    if nested:
        table, fp32 = dynamic_map(device).clone(), torch.float32
        second = QuantState(absmax=state.absmax2, code=table, blocksize=NESTED_BLOCKSIZE, dtype=fp32)
    quant_state = QuantState(
        absmax=state.absmax,
        shape=torch.Size(state.shape),
        code=_code(state.format, device).clone(),
        blocksize=state.blocksize,
        quant_type=state.format,
        dtype=dtype,
        offset=state.offset,
        state2=second,
    )
    return bitsandbytes.nn.modules.Params4bit(
        state.packed.view(-1, 1),
        requires_grad=False,
        quant_state=quant_state,
        blocksize=state.blocksize,
        compress_statistics=nested,
        quant_type=state.format,
        bnb_quantized=True,
    )


def _code(kind: str, device: torch.device) -> Tensor:
    return code_values(FORMATS[kind].layout(0), device)


def _expect_table(key: str, got: Tensor, is_standard: bool) -> None:
    if got.dtype not in READ_SCALE_DTYPES or not is_standard:
        raise ValueError(
            f"{key}: expected the standard table of the format, got other values{_of_old_cpus(got)}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
