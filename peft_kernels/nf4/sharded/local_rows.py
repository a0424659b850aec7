"""What a part of an NF4 weight holds, how parts become the whole again, and its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.code_tables import NESTED_BLOCKSIZE
from ...core.nf4_state import NF4State, packed_rows
from ...core.registry import public_ops as ops
from .partition import Cut

_ALIGNMENT = 256  # bytes, of what lies behind the codes in a buffer that holds both


@dataclass
class Part:
    """Rows [start, stop) of a weight, with every cell that they touch: of one that a cut goes through both
    sides have the same bytes.

    The second-level scales and their mean, 4 bytes for 16384 weights, are those of the whole weight in every
    part: groups of 256 scales end anywhere.
    """

    cut: Cut
    start: int
    stop: int
    packed: Tensor  # uint8, flat; behind the bytes of the rows there may be padding
    absmax: Tensor  # fp32 or uint8, flat, likewise
    absmax2: Tensor | None  # of the whole, as in NF4State
    offset: Tensor | None
    name: str = "weight"

    @classmethod
    def of(cls, state: NF4State) -> Part:
        """All rows of a packed weight, in its memory."""
        assert state.packed is not None and state.absmax is not None
        cut = Cut(tuple(state.shape), state.blocksize)
        flat = state.packed.reshape(-1), state.absmax.reshape(-1)
        return cls(cut, 0, cut.rows, *flat, state.absmax2, state.offset, state.name)

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("packed", "absmax", "absmax2", "offset")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        new: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **new)

    def owned(self) -> Part:
        """In memory that holds nothing else, or a file would have the whole of what this is a view of."""
        return self.map(lambda t: t if t.untyped_storage().nbytes() == t.nbytes else t.clone())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def whole_nbytes(self) -> int:
        """Of the weight that this is a part of."""
        second = sum(t.nbytes for t in (self.absmax2, self.offset) if t is not None)
        return self.cut.nbytes + self.cut.scales * self.absmax.itemsize + second

    def narrow(self, start: int, stop: int) -> Part:
        """Rows [start, stop) of this part, in its memory."""
        mine, inner = (
            self.cut.places(self.start, self.stop),
            self.cut.places(self.start + start, self.start + stop),
        )
        packed, absmax = (
            tensor[there.start - here.start : there.stop - here.start]
            for tensor, here, there in zip((self.packed, self.absmax), mine, inner, strict=True)
        )
        start, stop = self.start + start, self.start + stop
        return dataclasses.replace(self, start=start, stop=stop, packed=packed, absmax=absmax)

    def blank(self, rows: int) -> Part:
        """No rows yet, and memory for any part of so many: `load` fills it."""
        nbytes, scales = self.cut.largest(rows)
        packed, absmax = self.packed.new_zeros(nbytes), self.absmax.new_zeros(scales)
        absmax2, offset = (None if t is None else t.clone() for t in (self.absmax2, self.offset))
        return Part(self.cut, 0, 0, packed, absmax, absmax2, offset, self.name)

    def load(self, other: Part) -> None:
        """The same rows of a weight of the same form, in place.

        Raises
        ------
        ValueError
            Another form, or other rows.
        """
        forms = [(p.cut.shape, p.cut.blocksize, p.absmax2 is not None) for p in (self, other)]
        if forms[0] != forms[1]:
            expected, got = ("shape {}, blocksize {}, double_quant={}".format(*form) for form in forms)
            raise ValueError(f"{self.name}: expected a part of a weight of {expected}, got one of {got}")
        if not self.rows:
            self.start, self.stop = other.start, other.stop
        if (self.start, self.stop) != (other.start, other.stop):
            raise ValueError(
                f"{self.name}: expected rows {self.start} to {self.stop}, got {other.start} to {other.stop}"
            )
        for place, mine, its in zip(
            self.cut.places(self.start, self.stop),
            (self.packed, self.absmax),
            (other.packed, other.absmax),
            strict=True,
        ):
            length = place.stop - place.start
            mine[:length].copy_(its[:length])
        if self.absmax2 is not None and self.offset is not None:
            self.absmax2.copy_(other.absmax2)  # type: ignore[arg-type]
            self.offset.copy_(other.offset)  # type: ignore[arg-type]

    # All parts together.

    def inputs(self, count: int) -> list[Tensor]:
        """What is gathered of this one of `count` parts, flat, of the same sizes in each: packed bytes and
        scales; and the second-level scales where a part has no rows, and so may not know them."""
        rows = self.cut.rows_of_part(count)
        nbytes, scales = self.cut.largest(rows)
        found = [_of_length(self.packed, nbytes), _of_length(self.absmax, scales)]
        if self.absmax2 is not None and self.offset is not None and self.cut.has_empty_part(count):
            found.append(torch.cat([self.absmax2.reshape(-1), self.offset.reshape(-1)]))
        return found

    def outputs(self, count: int, gathered: Sequence[Tensor]) -> list[Tensor]:
        """The whole's packed bytes and scales, flat: where no cut goes through a cell, in the memory of what
        was gathered; else in memory of their own, to be filled by `join`."""
        sizes = self.cut.nbytes, self.cut.scales
        if self.cut.is_seamless(self.cut.rows_of_part(count)):
            return [tensor[:size] for tensor, size in zip(gathered[:2], sizes, strict=True)]
        return [tensor.new_empty(size) for tensor, size in zip(gathered[:2], sizes, strict=True)]

    def join(self, count: int, gathered: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill `outputs`, of memory of their own."""
        for r, rows in enumerate(self.cut.parts(self.cut.rows_of_part(count))):
            for out, tensor, place in zip(outputs, gathered[:2], self.cut.places(*rows), strict=True):
                out[place].copy_(tensor.view(count, -1)[r, : place.stop - place.start])

    def second_level(self, gathered: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The second-level scales and their mean: this part's; where they were gathered, the first part's."""
        absmax2, offset = self.absmax2, self.offset
        if absmax2 is None or offset is None or len(gathered) < 3:
            return absmax2, offset
        n = absmax2.numel()
        return gathered[2][:n].view(absmax2.shape), gathered[2][n : n + offset.numel()].view(offset.shape)

    def whole(self, flat: Sequence[Tensor], second: tuple[Tensor | None, Tensor | None]) -> NF4State:
        """The weight that this is a part of, of what `outputs` and `second_level` gave."""
        shape, (packed, absmax) = self.cut.shape, flat
        if len(shape) == 3:
            absmax = absmax.view(shape[0], -1)
        return NF4State(
            shape,
            self.cut.blocksize,
            packed_rows(packed, shape) if len(shape) == 2 else packed_rows(packed.view(shape[0], -1), shape),
            absmax,
            *second,
            double_quant=second[0] is not None,
            name=self.name,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(rows, in_features) or (rows, out_features, in_features), the bits of the whole's."""
        cut, rows = self.cut, self.rows
        if not rows or not cut.row:
            return self.packed.new_zeros((rows, *cut.shape[1:]), dtype=dtype)
        nbytes, scales = (place.stop - place.start for place in cut.places(self.start, self.stop))
        packed, absmax, offset = self.packed[:nbytes], self.absmax[:scales], self.offset
        if len(cut.shape) == 3:
            second: tuple[Tensor | None, Tensor | None] = None, None
            if self.absmax2 is not None and offset is not None:
                second = self.absmax2[self.start : self.stop], offset[self.start : self.stop]
            part = dataclasses.replace(self, cut=Cut((rows, *cut.shape[1:]), cut.blocksize))
            return part.whole((packed, absmax), second).dequantize(dtype)
        first, last = cut.cells(self.start, self.stop)
        if self.absmax2 is not None:
            lead = first % NESTED_BLOCKSIZE  # scales of their group that lie in the part before
            groups = self.absmax2[first // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)]
            absmax = ops.unpack_absmax(F.pad(absmax, (lead, 0)), groups, offset)[lead:]
        elements = min(last * cut.cell, cut.rows * cut.row) - first * cut.cell
        dense = ops.dequantize_nf4(packed, absmax, None, None, cut.blocksize, (1, elements), dtype)
        before = self.start * cut.row - first * cut.cell
        found: Tensor = dense.view(-1)[before : before + rows * cut.row].view(rows, cut.row)
        return found


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors in one buffer of bytes."""
    return torch.cat([_of_length(t.view(torch.uint8), _aligned(t.nbytes)) for t in tensors])


def separated(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `joined` joined."""
    found, begin = [], 0
    for t in like:
        found.append(buffer[begin : begin + t.nbytes].view(t.dtype))
        begin += _aligned(t.nbytes)
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _of_length(flat: Tensor, length: int) -> Tensor:
    return flat[:length] if flat.numel() >= length else F.pad(flat, (0, length - flat.numel()))
