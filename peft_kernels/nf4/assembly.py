"""Makes the state of a packed weight from its tensors, whatever stored them, and checks all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.code_tables import NESTED_BLOCKSIZE, WEIGHT_DTYPES
from ..core.formats import FORMATS, SCALE_DTYPES, Format
from ..core.packed_state import PackedState, packed_rows

READ_SCALE_DTYPES = (*WEIGHT_DTYPES, torch.float64)
"""Dtypes in which scales may be stored that are fp32 here."""

_STORAGE_DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST_SIZE = 1 << 40  # of one dimension


def assemble(
    key: str,
    shape: tuple[int, ...],
    blocksize: int,
    dtype: torch.dtype,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    format: str = "nf4",
) -> PackedState:
    """The state of a weight from its tensors. Checks every length and dtype, so that no kernel reads out of
    bounds."""
    if len(shape) != 2 or min(shape) < 0 or max(shape) > _LARGEST_SIZE:
        raise ValueError(f"{key}: expected a shape (out_features, in_features), got {short(shape)}")
    if blocksize not in FORMATS[format].blocksizes:
        allowed = FORMATS[format].blocksizes
        raise ValueError(f"{key}: expected blocksize one of {allowed}, got {short(blocksize)}")
    form = FORMATS[format]
    if form.rows_have_blocks and shape[1] % blocksize:
        raise ValueError(f"{key}: expected rows of whole blocks of {blocksize}, got shape {short(shape)}")
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{key}: expected dtype float32, bfloat16 or float16, got {short(dtype)}")
    if packed.dtype not in _STORAGE_DTYPES:
        raise ValueError(f"{key}: expected two codes a byte, in uint8 or a float type, got {packed.dtype}")
    # The bytes may be stored as a float dtype (for FSDP), padded at the end.
    flat = packed.detach().contiguous().view(-1).view(torch.uint8)
    numel = shape[0] * shape[1]
    nbytes, nblocks = form.nbytes(numel), form.scales(shape, blocksize)
    if not nbytes <= flat.numel() < nbytes + packed.element_size():
        raise ValueError(f"{key}: expected {nbytes} bytes for shape {shape}, got {flat.numel()}")
    expect(f"{key}.absmax", "number of blocks", nblocks, absmax.numel())
    if form.scale == "half":
        if absmax.dtype not in SCALE_DTYPES:
            raise ValueError(f"{key}.absmax: expected float16 or bfloat16, got {absmax.dtype}")
        if offset is not None:
            expect(f"{key}.zero_points", "dtype", torch.uint8, offset.dtype)
            expect(f"{key}.zero_points", "number of blocks", nblocks, offset.numel())
            offset = offset.contiguous().view(-1)
    elif absmax2 is None:
        if absmax.dtype not in READ_SCALE_DTYPES:
            raise ValueError(
                f"{key}.absmax: expected a floating dtype, got {absmax.dtype} and no second level"
            )
        absmax = absmax.float()
    elif form.by_code:
        expect(f"{key}.absmax", "dtype", torch.uint8, absmax.dtype)
        expect(f"{key}.scale_values", "number of values", 256, absmax2.numel())
        expect(f"{key}.scale_values", "dtype", torch.float32, absmax2.dtype)
    else:
        assert offset is not None
        expect(f"{key}.absmax", "dtype", torch.uint8, absmax.dtype)
        expect(f"{key}.nested_absmax", "number of blocks", -(-nblocks // NESTED_BLOCKSIZE), absmax2.numel())
        if absmax2.dtype not in READ_SCALE_DTYPES:
            raise ValueError(f"{key}.nested_absmax: expected a floating dtype, got {absmax2.dtype}")
        absmax2 = absmax2.float()
        offset = offset.float().reshape(())
    return PackedState(
        (shape[0], shape[1]),
        blocksize,
        packed_rows(flat[:nbytes], shape, form.bits),
        absmax.contiguous().view(-1),
        None if absmax2 is None else absmax2.contiguous().view(-1),
        offset,
        double_quant=offset is not None,
        format=format,
    )


def check_scales(key: str, state: PackedState, offset: float) -> None:
    """Raises ValueError unless all scales are finite and, where they are magnitudes, >= 0; for codes that are
    NaN too."""
    nested = state.absmax2 is not None and state.offset is not None
    scales = state.absmax2 if nested else state.absmax
    assert scales is not None
    if scales.device.type == "meta" or not scales.numel():
        return
    if state.absmax2 is not None and not nested:
        used = torch.bincount(scales.view(-1), minlength=256) > 0
        scales = state.absmax2.view(-1, 256)[:, used]
    form = FORMATS[state.format]
    signed = form.scale in ("half", "fp32")  # some quantisers of int4 make negative ones
    good = scales.isfinite() if signed else (scales >= 0) & (scales <= torch.finfo(scales.dtype).max)
    bad = int((~good).sum())
    if bad:
        name = f"{key}.{'nested_' if nested else ''}absmax"
        expected, got = ("scales", "") if signed else ("scales of 0 or more", " or negative")
        raise ValueError(
            f"{name}: expected finite {expected}, got {bad} NaN, Inf{got} among {scales.numel()}"
        )
    if form.scale == "half" and state.offset is not None and (count := int((state.offset > 16).sum())):
        raise ValueError(f"{key}.zero_points: expected 0 to 16, got {count} larger ones")
    if form.bits == 8:
        check_byte_scales(f"{key}.absmax", scales, form)
    if form.has_nan and state.packed is not None and (count := nan_codes(state.packed)):
        raise ValueError(f"{key}: expected codes of finite values, got {count} NaN among them")
    if float(scales.max()) + offset > torch.finfo(torch.float32).max:
        raise ValueError(f"{key}.nested_absmax: expected scales in the range of float32, got larger ones")


def check_byte_scales(name: str, scales: Tensor, form: Format) -> None:
    """Raises ValueError for scales with which the largest code's value is infinite."""
    largest = torch.finfo(torch.float32).max / form.largest
    if count := int((scales.abs() > largest).sum()):
        raise ValueError(f"{name}: expected scales up to {largest:.3g}, got {count} larger ones")


def nan_codes(packed: Tensor) -> int:
    """How many codes of E4M3 are NaN; 0 on the meta device."""
    if packed.device.type == "meta":
        return 0
    step = 1 << 24  # bounds the memory
    return sum(int((part & 127 == 127).sum()) for part in packed.view(-1).split(step))


def expect(key: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise ValueError(f"{key}: expected {what} {expected}, got {short(got)}")


def short(value: Any) -> str:
    """A value as short text without line breaks, for messages."""
    try:
        text = repr(value) if isinstance(value, (str, list, dict)) else str(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
