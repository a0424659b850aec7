"""One table of scales for several layers, of which each has a scale of its own beside those in E4M3.

No scale is negative, so a layer uses the codes 0 to 126, and perhaps 128, which is -0. A table of 256 values
has room for those of two layers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...core.packed_state import PackedState

_SECOND = 128  # where the second layer's codes begin
_NEGATIVE_ZERO, _ITS_PLACE = 128, 127  # 127 is NaN, which no scale is
_ONE = 0x38  # the code of 1.0


def joined_tables(parts: list[PackedState]) -> tuple[list[Tensor], Tensor]:
    """The codes of each layer's scales, uint8 (nblocks,), and what they mean in all, fp32 (256,).

    Raises ValueError if there are more than two scales of whole layers.
    """
    tables: list[Tensor] = []
    codes = []
    for part in parts:
        assert part.absmax is not None and part.absmax2 is not None
        which = next((i for i, table in enumerate(tables) if _equal(table, part.absmax2)), len(tables))
        if which == len(tables):
            tables.append(part.absmax2)
        codes.append((which, part.absmax))
    if len(tables) == 1:
        return [each for _, each in codes], tables[0]
    if len(tables) > 2:
        raise ValueError(
            f"{parts[-1].name}: expected at most two scales of whole layers in an expert's weight, got "
            f"{len(tables)}"
        )
    moved = [each.where(each != _NEGATIVE_ZERO, _ITS_PLACE) | _SECOND * which for which, each in codes]
    halves = [torch.cat((table[:_ITS_PLACE], table[_NEGATIVE_ZERO : _NEGATIVE_ZERO + 1])) for table in tables]
    return moved, torch.cat(halves)


def own_table(part: PackedState) -> PackedState:
    """A layer with codes and values as they were before `joined_tables`, if this changed them."""
    assert part.absmax is not None and part.absmax2 is not None
    codes, values = part.absmax, part.absmax2
    if not bool(values[_SECOND | _ONE] > 0):  # else negative scales
        return part
    begin = _SECOND * bool((codes >= _SECOND).any())
    own = values[begin : begin + _ITS_PLACE]
    none = values.new_full((1,), torch.nan)
    codes = codes & (_SECOND - 1)
    return dataclasses.replace(
        part,
        absmax=codes.where(codes != _ITS_PLACE, _NEGATIVE_ZERO),
        absmax2=torch.cat((own, none, -own, none)),
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether both mean the same; of ones without data the first is as good as the second."""
    return one.is_meta or torch.equal(one[:_ITS_PLACE], other[:_ITS_PLACE])
