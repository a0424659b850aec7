"""Rows or columns of an NF4 weight as an NF4 weight: the slice of one process under tensor parallelism.

A slice consists of whole blocks. A second-level scale covers 256 consecutive scales of the whole weight: a
slice that is not aligned to such groups gets first-level scales in fp32, of the same values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.code_tables import NESTED_BLOCKSIZE
from ...core.formats import FORMATS
from ...core.packed_state import PackedState, packed_rows
from ...core.registry import public_ops as ops
from .partition import Partition

Second = tuple[Tensor, Tensor]
"""Second-level scales and the mean of the scales."""


def slice_size(size: int, count: int) -> int:
    """Rows or columns of each of `count` slices but the last, as torch splits."""
    return -(-size // count)


def unsliceable_reason(shape: tuple[int, ...], format: str, blocksize: int, dim: int, count: int) -> str:
    """Why a weight (out_features, in_features) cannot be split into `count` slices along `dim`, or ""."""
    if not FORMATS[format].is_sliced:
        return f"weights in {format} are not cut by a plan yet"
    if len(shape) != 2:
        return f"expected a weight (out_features, in_features), got {tuple(shape)}"
    size = slice_size(shape[dim], count)
    what = ("rows", "columns")[dim]
    if size * (count - 1) >= shape[dim]:
        return f"{shape[dim]} {what} of it leave some of {count} processes without any"
    if dim == 0 and not Partition(shape, blocksize).is_cell_aligned(size):
        return (
            f"a cut after {size} of its rows of {shape[1]} goes through a block of {blocksize}, "
            "which two processes cannot share"
        )
    if dim == 1 and (shape[1] % blocksize or size % blocksize):
        return (
            f"its {shape[1]} columns, {size} for each of {count} processes, are not whole blocks of "
            f"{blocksize}, which two processes cannot share"
        )
    return ""


def slice_state(state: PackedState, dim: int, start: int, stop: int) -> PackedState:
    """Rows (`dim` 0) or columns (`dim` 1) [start, stop) of a packed weight, in memory of their own.

    `unsliceable_reason` tells whether it can be split there. Dequantised values are bit-identical to the
    whole weight's. The slice stays double-quantised if it begins at a group of 256 scales."""
    assert state.packed is not None and state.absmax is not None and len(state.shape) == 2
    rows, columns = state.shape
    if dim == 1:
        shape = (rows, stop - start)
        blocks = columns // state.blocksize
        packed = state.packed.view(rows, -1)[:, start // 2 : stop // 2]
        scales, values = one_level_scales(state)
        first, last = start // state.blocksize, stop // state.blocksize
        scales = scales.view(rows, blocks)[:, first:last].reshape(-1)
        return _of(state, shape, packed, scales, (values, None))
    shape = (stop - start, columns)
    codes, places = Partition((rows, columns), state.blocksize, state.format).slices(start, stop)
    packed, absmax = state.packed.reshape(-1)[codes], state.absmax[places]
    if state.absmax2 is None or state.offset is None:
        return _of(state, shape, packed, absmax, (state.absmax2, None))
    lead = places.start % NESTED_BLOCKSIZE
    groups = state.absmax2[places.start // NESTED_BLOCKSIZE : -(-places.stop // NESTED_BLOCKSIZE)]
    if lead == 0:
        return _of(state, shape, packed, absmax, (groups, state.offset))
    scales = ops.unpack_absmax(F.pad(absmax, (lead, 0)), groups, state.offset)[lead:]
    return _of(state, shape, packed, scales, (None, None))


def one_level_scales(state: PackedState) -> tuple[Tensor, Tensor | None]:
    """The scale of each block, (nblocks,), without double quantisation: fp32; or uint8 codes, and their
    values."""
    assert state.absmax is not None
    scales = state.absmax.view(-1)
    if state.absmax2 is None or state.offset is None:
        return scales, state.absmax2
    return ops.unpack_absmax(scales, state.absmax2, state.offset), None


def encode_scales(scales: Tensor, second: Second) -> Tensor | None:
    """uint8 codes (nblocks,) of scales for given second-level scales, or None if some scale has no code.

    Decoded values ascend with the code in each group; of codes with equal values the lowest is used.
    """
    absmax2, offset = second
    every = torch.arange(NESTED_BLOCKSIZE, dtype=torch.uint8, device=scales.device).repeat(absmax2.numel())
    meanings = ops.unpack_absmax(every, absmax2, offset).view(-1, NESTED_BLOCKSIZE)  # [group, code]
    missing = absmax2.numel() * NESTED_BLOCKSIZE - scales.numel()
    by_group = F.pad(scales, (0, missing)).view(-1, NESTED_BLOCKSIZE)
    codes = torch.searchsorted(meanings, by_group).clamp_(max=NESTED_BLOCKSIZE - 1)
    found = meanings.gather(1, codes).view(-1)[: scales.numel()]
    return codes.to(torch.uint8).view(-1)[: scales.numel()] if torch.equal(found, scales) else None


def _of(
    state: PackedState,
    shape: tuple[int, int],
    packed: Tensor,
    absmax: Tensor,
    second: tuple[Tensor | None, Tensor | None],
) -> PackedState:
    own = packed.clone(memory_format=torch.contiguous_format).view(-1)
    absmax2, offset = (None if tensor is None else tensor.clone() for tensor in second)
    return PackedState(
        shape,
        state.blocksize,
        packed_rows(own, shape),
        absmax.clone(),
        absmax2,
        offset,
        double_quant=offset is not None,
        name=state.name,
        format=state.format,
        slice_of=tuple(state.shape),
    )
