"""The rows of an NF4 weight that one rank holds: gathering, loading and dequantising them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.code_tables import NESTED_BLOCKSIZE
from ...core.formats import FORMATS
from ...core.packed_state import PackedState, packed_rows
from ...core.registry import public_ops as ops
from .partition import Partition

_ALIGNMENT = 256  # bytes, of each tensor in a packed buffer


@dataclass
class LocalRows:
    """Rows [start, stop) of a weight with every cell they touch; two ranks may hold copies of the same cell.

    Each rank holds the second-level scales of the whole weight (4 bytes per 16384 values), because groups of
    256 scales do not end at row boundaries, or the values of the codes of scales.
    """

    partition: Partition
    start: int
    stop: int
    packed: Tensor  # uint8, flat; may have padding at the end
    absmax: Tensor  # as in PackedState, flat; may have padding
    absmax2: Tensor | None  # of the whole weight, as in PackedState
    offset: Tensor | None  # of the whole weight; zero points like absmax
    name: str = "weight"

    @property
    def format(self) -> str:
        return self.partition.format

    @classmethod
    def of(cls, state: PackedState) -> LocalRows:
        """All rows of a packed weight; shares its memory."""
        assert state.packed is not None and state.absmax is not None
        partition = Partition(tuple(state.shape), state.blocksize, state.format)
        flat, offset = (state.packed.reshape(-1), state.absmax.reshape(-1)), state.offset
        if offset is not None and state.absmax2 is None:
            offset = offset.reshape(-1)
        return cls(partition, 0, partition.rows, *flat, state.absmax2, offset, state.name)

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("packed", "absmax", "absmax2", "offset")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> LocalRows:
        new: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **new)

    def with_own_memory(self) -> LocalRows:
        """Copies tensors that are views, so that saving them does not write the whole storage."""
        return self.map(lambda t: t if t.untyped_storage().nbytes() == t.nbytes else t.clone())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the whole weight."""
        sizes = self._sizes(self.partition.nbytes, self.partition.scales)
        divided = sum(n * t.itemsize for n, t in zip(sizes, self.divided, strict=True))
        return divided + sum(t.nbytes for t in self._second)

    @property
    def _has_zero_points(self) -> bool:
        return self.offset is not None and self.absmax2 is None

    @property
    def divided(self) -> list[Tensor]:
        """The tensors of which each rank holds a part: packed bytes, scales, and zero points if there are
        some."""
        zero_points = [] if self.offset is None or self.absmax2 is not None else [self.offset]
        return [self.packed, self.absmax, *zero_points]

    @property
    def _second(self) -> list[Tensor]:
        """The tensors of which each rank holds all."""
        return [tensor for tensor in self._pair if tensor is not None]

    @property
    def _pair(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self._has_zero_points else (self.absmax2, self.offset)

    def _sizes(self, nbytes: Any, scales: Any) -> list[Any]:
        """What holds for each of the divided tensors."""
        return [nbytes, scales, scales] if self._has_zero_points else [nbytes, scales]

    def _places(self, start: int, stop: int) -> list[slice]:
        """Slices of the whole weight's divided tensors for rows [start, stop)."""
        return self._sizes(*self.partition.slices(start, stop))

    def _with_divided(self, divided: Sequence[Tensor], **changes: Any) -> LocalRows:
        packed, absmax, *zero_points = divided
        offset = zero_points[0] if zero_points else self.offset
        return dataclasses.replace(self, packed=packed, absmax=absmax, offset=offset, **changes)

    def narrow(self, start: int, stop: int) -> LocalRows:
        """Rows [start, stop) of these rows; shares memory."""
        start, stop = self.start + start, self.start + stop
        mine, inner = self._places(self.start, self.stop), self._places(start, stop)
        parts = [
            tensor[there.start - here.start : there.stop - here.start]
            for tensor, here, there in zip(self.divided, mine, inner, strict=True)
        ]
        return self._with_divided(parts, start=start, stop=stop)

    def empty(self, rows: int) -> LocalRows:
        """Holds no rows yet, but memory for any `rows` rows; `load` fills it."""
        absmax2, offset = (None if t is None else t.clone() for t in (self.absmax2, self.offset))
        own = dataclasses.replace(self, absmax2=absmax2, offset=offset)
        sizes = self._sizes(*self.partition.max_sizes(rows))
        parts = [tensor.new_zeros(size) for tensor, size in zip(self.divided, sizes, strict=True)]
        return own._with_divided(parts, start=0, stop=0)

    def load(self, other: LocalRows) -> None:
        """Copies the same rows of another weight, in place.

        Raises ValueError for another shape, format, blocksize or double_quant, or other rows.
        """
        forms = [
            (p.partition.shape, p.format, p.partition.blocksize, p.offset is not None) for p in (self, other)
        ]
        if forms[0] != forms[1]:
            expected, got = ("shape {}, {}, blocksize {}, double_quant={}".format(*form) for form in forms)
            raise ValueError(f"{self.name}: expected a part of a weight of {expected}, got one of {got}")
        if not self.rows:
            self.start, self.stop = other.start, other.stop
        if (self.start, self.stop) != (other.start, other.stop):
            raise ValueError(
                f"{self.name}: expected rows {self.start} to {self.stop}, got {other.start} to {other.stop}"
            )
        places = self._places(self.start, self.stop)
        for place, mine, its in zip(places, self.divided, other.divided, strict=True):
            length = place.stop - place.start
            mine[:length].copy_(its[:length])
        for mine, its in zip(self._second, other._second, strict=True):
            mine.copy_(its)

    # Gathering.

    def gather_inputs(self, count: int) -> list[Tensor]:
        """Flat tensors to gather from each of `count` ranks, of equal sizes: packed bytes and scales; and the
        second-level scales if some rank has no rows, since it may not have them."""
        sizes = self._sizes(*self.partition.max_sizes(self.partition.rows_per_rank(count)))
        found = [_of_length(tensor, size) for tensor, size in zip(self.divided, sizes, strict=True)]
        if self._second and self.partition.has_empty_rank(count):
            found.append(torch.cat([tensor.reshape(-1) for tensor in self._second]))
        return found

    def gather_outputs(self, count: int, gathered: Sequence[Tensor]) -> list[Tensor]:
        """The divided tensors of the whole weight, flat: views of `gathered` if ranks are cell-aligned,
        otherwise new tensors for `join` to fill."""
        sizes = self._sizes(self.partition.nbytes, self.partition.scales)
        if self.partition.is_cell_aligned(self.partition.rows_per_rank(count)):
            return [tensor[:size] for tensor, size in zip(gathered, sizes, strict=False)]
        return [tensor.new_empty(size) for tensor, size in zip(gathered, sizes, strict=False)]

    def join(self, count: int, gathered: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fills `outputs` from `gathered` where ranks are not cell-aligned."""
        for r, rows in enumerate(self.partition.row_ranges(self.partition.rows_per_rank(count))):
            for out, tensor, place in zip(outputs, gathered, self._places(*rows), strict=False):
                out[place].copy_(tensor.view(count, -1)[r, : place.stop - place.start])

    def second_level(self, gathered: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Second-level scales and their mean: the first rank's if they were gathered, else these. (None,
        None) if there are none."""
        absmax2, offset = self.absmax2, self.offset
        if absmax2 is None:
            return None, None
        if len(gathered) < 3:
            return absmax2, offset
        n = absmax2.numel()
        if offset is not None:
            offset = gathered[2][n : n + offset.numel()].view(offset.shape)
        return gathered[2][:n].view(absmax2.shape), offset

    def whole(self, flat: Sequence[Tensor], second: tuple[Tensor | None, Tensor | None]) -> PackedState:
        """The whole weight, from the results of `gather_outputs` and `second_level`."""
        shape, (packed, absmax, *zero_points) = self.partition.shape, flat
        absmax2, offset = second
        if zero_points:
            offset = zero_points[0]
        if len(shape) == 3:
            packed, absmax = packed.view(shape[0], -1), absmax.view(shape[0], -1)
            offset = offset.view(shape[0], -1) if zero_points and offset is not None else offset
        return PackedState(
            shape,
            self.partition.blocksize,
            packed_rows(packed, shape, FORMATS[self.format].bits),
            absmax,
            absmax2,
            offset,
            double_quant=offset is not None,
            name=self.name,
            format=self.format,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(rows, in_features) or (rows, out_features, in_features), bit-identical to the whole weight's
        rows."""
        partition, rows = self.partition, self.rows
        if not rows or not partition.row:
            return self.packed.new_zeros((rows, *partition.shape[1:]), dtype=dtype)
        places = self._places(self.start, self.stop)
        parts = [t[: place.stop - place.start] for t, place in zip(self.divided, places, strict=True)]
        if len(partition.shape) == 3:
            whole = dataclasses.replace(partition, shape=(rows, *partition.shape[1:]))
            absmax2, offset = (None if t is None else t[self.start : self.stop] for t in self._pair)
            return (
                dataclasses.replace(self, partition=whole).whole(parts, (absmax2, offset)).dequantize(dtype)
            )
        first, last = partition.cells(self.start, self.stop)
        packed, absmax, *zero_points = parts
        layout, absmax2 = FORMATS[self.format].layout(partition.blocksize), self.absmax2
        if absmax2 is not None and self.offset is not None:
            lead = first % NESTED_BLOCKSIZE  # scales of the first group that precede these rows
            groups = absmax2[first // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)]
            absmax, absmax2 = ops.unpack_absmax(F.pad(absmax, (lead, 0)), groups, self.offset)[lead:], None
        elements = min(last * partition.cell, partition.rows * partition.row) - first * partition.cell
        # Cells of bytes are whole rows, others have no shape.
        shape = (1, elements) if elements % partition.row else (elements // partition.row, partition.row)
        offset = zero_points[0] if zero_points else None
        dense = ops.dequantize_nf4(packed, absmax, absmax2, offset, layout, shape, dtype)
        skipped = self.start * partition.row - first * partition.cell
        found: Tensor = dense.view(-1)[skipped : skipped + rows * partition.row].view(rows, partition.row)
        return found


def pack_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors to one byte buffer, each aligned."""
    return torch.cat([_of_length(t.view(torch.uint8), _aligned(t.nbytes)) for t in tensors])


def unpack_bytes(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the tensors in a buffer of `pack_bytes`."""
    found, begin = [], 0
    for t in like:
        found.append(buffer[begin : begin + t.nbytes].view(t.dtype))
        begin += _aligned(t.nbytes)
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _of_length(flat: Tensor, length: int) -> Tensor:
    return flat[:length] if flat.numel() >= length else F.pad(flat, (0, length - flat.numel()))
