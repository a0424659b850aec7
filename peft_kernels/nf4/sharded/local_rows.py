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
from ...core.nf4_state import NF4State, packed_rows
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
    absmax: Tensor  # fp32 or uint8, flat; may have padding
    absmax2: Tensor | None  # of the whole weight, as in NF4State
    offset: Tensor | None
    name: str = "weight"
    format: str = "nf4"

    @classmethod
    def of(cls, state: NF4State) -> LocalRows:
        """All rows of a packed weight; shares its memory."""
        assert state.packed is not None and state.absmax is not None
        if reason := FORMATS[state.format].undivided_reason:
            raise NotImplementedError(f"{state.name}: {reason}: expected another format, or DDP")
        partition = Partition(tuple(state.shape), state.blocksize)
        flat = state.packed.reshape(-1), state.absmax.reshape(-1)
        return cls(partition, 0, partition.rows, *flat, state.absmax2, state.offset, state.name, state.format)

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
        second = sum(t.nbytes for t in (self.absmax2, self.offset) if t is not None)
        return self.partition.nbytes + self.partition.scales * self.absmax.itemsize + second

    def narrow(self, start: int, stop: int) -> LocalRows:
        """Rows [start, stop) of these rows; shares memory."""
        mine, inner = (
            self.partition.slices(self.start, self.stop),
            self.partition.slices(self.start + start, self.start + stop),
        )
        packed, absmax = (
            tensor[there.start - here.start : there.stop - here.start]
            for tensor, here, there in zip((self.packed, self.absmax), mine, inner, strict=True)
        )
        start, stop = self.start + start, self.start + stop
        return dataclasses.replace(self, start=start, stop=stop, packed=packed, absmax=absmax)

    def empty(self, rows: int) -> LocalRows:
        """Holds no rows yet, but memory for any `rows` rows; `load` fills it."""
        nbytes, scales = self.partition.max_sizes(rows)
        packed, absmax = self.packed.new_zeros(nbytes), self.absmax.new_zeros(scales)
        absmax2, offset = (None if t is None else t.clone() for t in (self.absmax2, self.offset))
        return LocalRows(self.partition, 0, 0, packed, absmax, absmax2, offset, self.name, self.format)

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
        for place, mine, its in zip(
            self.partition.slices(self.start, self.stop),
            (self.packed, self.absmax),
            (other.packed, other.absmax),
            strict=True,
        ):
            length = place.stop - place.start
            mine[:length].copy_(its[:length])
        for mine, its in zip(self._second, other._second, strict=True):
            mine.copy_(its)

    # Gathering.

    def gather_inputs(self, count: int) -> list[Tensor]:
        """Flat tensors to gather from each of `count` ranks, of equal sizes: packed bytes and scales; and the
        second-level scales if some rank has no rows, since it may not have them."""
        rows = self.partition.rows_per_rank(count)
        nbytes, scales = self.partition.max_sizes(rows)
        found = [_of_length(self.packed, nbytes), _of_length(self.absmax, scales)]
        if self._second and self.partition.has_empty_rank(count):
            found.append(torch.cat([tensor.reshape(-1) for tensor in self._second]))
        return found

    @property
    def _second(self) -> list[Tensor]:
        return [tensor for tensor in (self.absmax2, self.offset) if tensor is not None]

    def gather_outputs(self, count: int, gathered: Sequence[Tensor]) -> list[Tensor]:
        """Flat packed bytes and scales of the whole weight: views of `gathered` if ranks are cell-aligned,
        otherwise new tensors for `join` to fill."""
        sizes = self.partition.nbytes, self.partition.scales
        if self.partition.is_cell_aligned(self.partition.rows_per_rank(count)):
            return [tensor[:size] for tensor, size in zip(gathered[:2], sizes, strict=True)]
        return [tensor.new_empty(size) for tensor, size in zip(gathered[:2], sizes, strict=True)]

    def join(self, count: int, gathered: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fills `outputs` from `gathered` where ranks are not cell-aligned."""
        for r, rows in enumerate(self.partition.row_ranges(self.partition.rows_per_rank(count))):
            for out, tensor, place in zip(outputs, gathered[:2], self.partition.slices(*rows), strict=True):
                out[place].copy_(tensor.view(count, -1)[r, : place.stop - place.start])

    def second_level(self, gathered: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Second-level scales and their mean: the first rank's if they were gathered, else these."""
        absmax2, offset = self.absmax2, self.offset
        if absmax2 is None or len(gathered) < 3:
            return absmax2, offset
        n = absmax2.numel()
        if offset is not None:
            offset = gathered[2][n : n + offset.numel()].view(offset.shape)
        return gathered[2][:n].view(absmax2.shape), offset

    def whole(self, flat: Sequence[Tensor], second: tuple[Tensor | None, Tensor | None]) -> NF4State:
        """The whole weight, from the results of `gather_outputs` and `second_level`."""
        shape, (packed, absmax) = self.partition.shape, flat
        if len(shape) == 3:
            absmax = absmax.view(shape[0], -1)
        return NF4State(
            shape,
            self.partition.blocksize,
            packed_rows(packed, shape) if len(shape) == 2 else packed_rows(packed.view(shape[0], -1), shape),
            absmax,
            *second,
            double_quant=second[1] is not None,
            name=self.name,
            format=self.format,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(rows, in_features) or (rows, out_features, in_features), bit-identical to the whole weight's
        rows."""
        partition, rows = self.partition, self.rows
        if not rows or not partition.row:
            return self.packed.new_zeros((rows, *partition.shape[1:]), dtype=dtype)
        nbytes, scales = (place.stop - place.start for place in partition.slices(self.start, self.stop))
        packed, absmax, offset = self.packed[:nbytes], self.absmax[:scales], self.offset
        if len(partition.shape) == 3:
            absmax2 = None if self.absmax2 is None else self.absmax2[self.start : self.stop]
            second = absmax2, None if offset is None else offset[self.start : self.stop]
            part = dataclasses.replace(
                self, partition=Partition((rows, *partition.shape[1:]), partition.blocksize)
            )
            return part.whole((packed, absmax), second).dequantize(dtype)
        first, last = partition.cells(self.start, self.stop)
        layout, absmax2 = FORMATS[self.format].layout(partition.blocksize), self.absmax2
        if absmax2 is not None and offset is not None:
            lead = first % NESTED_BLOCKSIZE  # scales of the first group that precede these rows
            groups = absmax2[first // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)]
            absmax, absmax2 = ops.unpack_absmax(F.pad(absmax, (lead, 0)), groups, offset)[lead:], None
        elements = min(last * partition.cell, partition.rows * partition.row) - first * partition.cell
        dense = ops.dequantize_nf4(packed, absmax, absmax2, None, layout, (1, elements), dtype)
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
