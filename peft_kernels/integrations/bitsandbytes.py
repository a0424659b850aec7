"""bitsandbytes' NF4 in and out: its checkpoint keys and its Params4bit. The library itself stays optional."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..code_tables import BLOCKSIZES, NESTED_BLOCKSIZE, WEIGHT_DTYPES, dynamic_map, nf4_code
from ..nf4_state import NF4State, packed_rows
from .bitsandbytes_ops import disable as disable
from .bitsandbytes_ops import enable as enable
from .bitsandbytes_ops import unpack as unpack

STATE_ITEM = "quant_state.bitsandbytes__nf4"
_CPU = torch.device("cpu")


def to_state_dict(state: NF4State, dtype: torch.dtype, key: str) -> dict[str, Tensor]:
    """A weight of a nominal dtype under bitsandbytes' keys, the first of which is `key`. A dense one is one
    plain tensor."""
    if state.dense is not None:
        return {key: state.dense}
    assert state.packed is not None and state.absmax is not None
    numbers: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": state.blocksize,
        "dtype": _name(dtype),
        "shape": list(state.shape),
    }
    device = state.packed.device
    items = {
        key: state.packed.view(-1, 1),
        f"{key}.absmax": state.absmax,
        f"{key}.quant_map": nf4_code(device).clone(),
    }
    if state.absmax2 is not None and state.offset is not None:
        items[f"{key}.nested_absmax"] = state.absmax2
        items[f"{key}.nested_quant_map"] = dynamic_map(device).clone()
        numbers |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": state.offset.item(),
        }
    blob = json.dumps(numbers).encode()
    items[f"{key}.{STATE_ITEM}"] = torch.tensor(list(blob), dtype=torch.uint8, device=device)
    return items


def from_state_dict(state_dict: Mapping[str, Any], key: str) -> tuple[NF4State, torch.dtype]:
    """The weight saved under `key`, and its nominal dtype. ValueError names the item that is missing,
    truncated or foreign."""

    def item(suffix: str) -> Tensor:
        value = state_dict.get(key + suffix)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key}{suffix}: expected a tensor in the state dict, got {type(value).__name__}"
            )
        return value

    packed = item("")
    foreign = [k for k in state_dict if k.startswith(f"{key}.quant_state.") and not k.endswith(STATE_ITEM)]
    if foreign:
        raise ValueError(f"{foreign[0]}: expected quantisation type nf4, this checkpoint holds another")
    blob = item(f".{STATE_ITEM}")
    try:
        numbers = json.loads(bytes(blob.to(torch.uint8).tolist()).decode())
        shape = tuple(int(n) for n in numbers["shape"])
        blocksize, dtype = int(numbers["blocksize"]), getattr(torch, numbers["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{key}.{STATE_ITEM}: expected bitsandbytes' JSON, got something else ({error})"
        ) from error
    _expect(f"{key}.{STATE_ITEM}", "quant_type", "nf4", numbers.get("quant_type"))
    nested = f"{key}.nested_absmax" in state_dict or "nested_offset" in numbers
    if nested:
        _expect(f"{key}.{STATE_ITEM}", "nested_blocksize", NESTED_BLOCKSIZE, numbers.get("nested_blocksize"))
        if not isinstance(numbers.get("nested_offset"), (int, float)):
            raise ValueError(
                f"{key}.{STATE_ITEM}: expected a number nested_offset, got {numbers.get('nested_offset')}"
            )
        _expect_table(f"{key}.nested_quant_map", dynamic_map(_CPU), item(".nested_quant_map"))
    _expect_table(f"{key}.quant_map", nf4_code(_CPU), item(".quant_map"))
    state = _assemble(
        key,
        shape,
        blocksize,
        dtype,
        packed,
        item(".absmax"),
        item(".nested_absmax") if nested else None,
        torch.tensor(float(numbers["nested_offset"]), device=packed.device) if nested else None,
    )
    return state, dtype


def is_quantized(params4bit: Any) -> bool:
    return getattr(params4bit, "quant_state", None) is not None and bool(
        getattr(params4bit, "bnb_quantized", False)
    )


def reason_unusable(params4bit: Any) -> str | None:
    """Why a Params4bit cannot be read as NF4 in place, or None. Cheap: looks at no data."""
    if not is_quantized(params4bit):
        return "the weight is not quantised yet (move it to its device first)"
    quant_state = params4bit.quant_state
    if getattr(quant_state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes repacked the weight for CPU inference and rounded its scales; reload the checkpoint"
        )
    if quant_state.quant_type != "nf4":
        return f"quantisation type {quant_state.quant_type}, expected nf4"
    if len(quant_state.shape) != 2:
        return f"shape {tuple(quant_state.shape)}, expected two dimensions"
    if quant_state.nested and quant_state.state2.blocksize != NESTED_BLOCKSIZE:
        return f"nested blocksize {quant_state.state2.blocksize}, expected {NESTED_BLOCKSIZE}"
    return None


def state_of(params4bit: Any, name: str = "params4bit") -> NF4State:
    """A quantised Params4bit as it is, sharing memory. ValueError says why that cannot be."""
    reason = reason_unusable(params4bit)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    quant_state = params4bit.quant_state
    nested = quant_state.nested
    return _assemble(
        name,
        tuple(quant_state.shape),
        quant_state.blocksize,
        quant_state.dtype,
        params4bit.data,
        quant_state.absmax,
        quant_state.state2.absmax if nested else None,
        quant_state.offset if nested else None,
    )


def to_params4bit(state: NF4State, dtype: torch.dtype) -> Any:
    """A `bitsandbytes.nn.Params4bit` that shares memory with a weight. ValueError when that is dense."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    if state.dense is not None or state.packed is None or state.absmax is None:
        raise ValueError(
            "weight: expected packed NF4, got a weight made dense by a write (call requantize_())"
        )
    device, nested = state.packed.device, state.absmax2 is not None
    second = (
        QuantState(
            absmax=state.absmax2,
            code=dynamic_map(device).clone(),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        if nested
        else None
    )
    quant_state = QuantState(
        absmax=state.absmax,
        shape=torch.Size(state.shape),
        code=nf4_code(device).clone(),
        blocksize=state.blocksize,
        quant_type="nf4",
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
        quant_type="nf4",
        bnb_quantized=True,
    )


def _assemble(
    key: str,
    shape: tuple[int, ...],
    blocksize: int,
    dtype: torch.dtype,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
) -> NF4State:
    """Check every length and dtype, so that no kernel reads past the end."""
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{key}: expected a shape (out_features, in_features), got {shape}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{key}: expected blocksize one of {BLOCKSIZES}, got {blocksize}")
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{key}: expected dtype float32, bfloat16 or float16, got {dtype}")
    # The bytes may be stored under a float type (FSDP asks for it), with the last ones padded.
    flat = packed.detach().contiguous().view(-1).view(torch.uint8)
    numel = shape[0] * shape[1]
    nbytes, nblocks = (numel + 1) // 2, -(-numel // blocksize)
    if not nbytes <= flat.numel() < nbytes + packed.element_size():
        raise ValueError(f"{key}: expected {nbytes} bytes for shape {shape}, got {flat.numel()}")
    _expect(f"{key}.absmax", "number of blocks", nblocks, absmax.numel())
    if absmax2 is None:
        if not absmax.is_floating_point():
            raise ValueError(
                f"{key}.absmax: expected a floating dtype, got {absmax.dtype} and no second level"
            )
        absmax = absmax.float()
    else:
        assert offset is not None
        _expect(f"{key}.absmax", "dtype", torch.uint8, absmax.dtype)
        _expect(f"{key}.nested_absmax", "number of blocks", -(-nblocks // NESTED_BLOCKSIZE), absmax2.numel())
        absmax2 = absmax2.float()
        offset = offset.float().reshape(())
    return NF4State(
        (shape[0], shape[1]),
        blocksize,
        packed_rows(flat[:nbytes], shape),
        absmax.contiguous().view(-1),
        None if absmax2 is None else absmax2.contiguous().view(-1),
        offset,
        double_quant=absmax2 is not None,
    )


def _expect(key: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise ValueError(f"{key}: expected {what} {expected}, got {got}")


def _expect_table(key: str, expected: Tensor, got: Tensor) -> None:
    if not torch.equal(expected, got.detach().float().cpu().view(-1)):
        raise ValueError(f"{key}: expected the standard table of the format, got other values")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
