"""What the owners of int4 checkpoints have in common.

Codes from 0 to 15 of a linear weight, and for each group of a row's codes a scale in 16 bits and a zero
point: a value is (code - zero point) * scale. Files differ in how words hold codes and zero points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...core.code_tables import ZERO_POINT
from ...core.formats import FORMATS, SCALE_DTYPES
from ...core.packed_state import PackedState
from .int4_words import NATURAL, PER_WORD, Words
from .owner import Owner, check_finite, expect_shape, kept, tensor_of

_SHORTEST = min(FORMATS["int4"].blocksizes)


class Int4(Owner):
    format = "int4"
    scale: ClassVar[str]
    zeros: ClassVar[str]
    index: ClassVar[str] = ""
    """Parts: the scales; the zero points; the groups of columns, if there is one."""
    always_zeros: ClassVar[bool] = True
    """Whether a file has zero points where all of them are 8, too."""
    axis: ClassVar[int] = 1
    transposed: ClassVar[bool] = False
    order: ClassVar[tuple[int, ...]] = NATURAL
    """How words hold codes, see `Words`; those of zero points hold them of a column."""
    zero_shift: ClassVar[int] = 0
    """What to add to the words of zero points."""

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        stem = self.stem(weight)
        words = tensor_of(tensors, stem, self.codes, torch.int32)
        scales = tensor_of(tensors, stem, self.scale, *SCALE_DTYPES)
        expect_shape(stem + self.codes, self._in_file("out", "in", self.axis), words.shape)
        out, into = self._codes.shape(words.shape)
        groups = scales.shape[0 if self.transposed else -1] if scales.dim() == 2 else "groups"
        expect_shape(stem + self.scale, self._in_file(out, groups), scales.shape)
        assert isinstance(groups, int)
        length = self._length(tensors, into, groups)
        self.check_beside(tensors, stem, (out, into), length)
        blocksize = self._blocksize(stem, into, groups, length, self.index in tensors)
        check_finite(stem + self.scale, scales)
        offset = self._zero_points(tensors, stem, out, groups)
        of_block = torch.arange(0, into, blocksize, device=scales.device) // length
        scales = scales.T if self.transposed else scales
        state = PackedState(
            (out, into),
            blocksize,
            self._codes.packed(words),
            _repeated(scales, of_block),
            None,
            None if offset is None else _repeated(offset, of_block),
            double_quant=offset is not None,
            name=weight,
            format=self.format,
        )
        # Groups that are longer than blocks are found again by the shape of the scales.
        return state, kept(tensors, (*self.beside, *([self.scale] if length > blocksize else [])))

    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None
        stem, (out, into) = self.stem(weight), state.shape
        groups = into // state.blocksize
        if self.scale in aside:
            groups = aside[self.scale].shape[0 if self.transposed else 1]
        blocks = self._length(aside, into, groups) // state.blocksize
        scales = self._grouped(state.absmax, out, blocks, stem + self.scale)
        scales = (scales.T if self.transposed else scales).contiguous()
        found = {stem + self.codes: self._codes.of_packed(state.packed), stem + self.scale: scales}
        offset = state.offset
        if offset is None and self.always_zeros:
            offset = torch.full_like(state.absmax, ZERO_POINT, dtype=torch.uint8)
        if offset is not None:
            points = self._grouped(offset, out, blocks, stem + self.zeros)
            if int(points.max()) > 15:
                raise ValueError(
                    f"{stem + self.zeros}: expected zero points up to 15, got {int(points.max())}"
                )
            found[stem + self.zeros] = (self._points.of_codes(points) - self.zero_shift).contiguous()
        return found | {stem + name: aside[name] for name in self.beside if name in aside}

    @property
    def _codes(self) -> Words:
        return Words(self.axis, self.transposed, self.order)

    @property
    def _points(self) -> Words:
        return Words(0, self.transposed, self.order)

    def _in_file(self, out: int | str, columns: int | str, axis: int | None = None) -> tuple[int | str, ...]:
        """The shape of a matrix (out, columns) in the file, with 8 of an axis in a word."""
        shape = [out, columns]
        if axis is not None:
            length = shape[axis]
            shape[axis] = f"{length} / 8" if isinstance(length, str) else -(-length // PER_WORD)
        return tuple(reversed(shape) if self.transposed else shape)

    def _length(self, tensors: Mapping[str, Tensor], into: int, groups: int) -> int:
        """Input features of a group. The last one may have fewer, which only an index of groups can tell: on
        the meta device a power of two is assumed, as tools take."""
        index = tensors.get(self.index)
        if index is not None and not index.is_meta:
            return max(int((index == 0).sum()), 1)
        length = -(-into // max(groups, 1))
        power = 1 << (length - 1).bit_length()
        return power if index is not None and -(-into // power) == groups else length

    def _blocksize(self, stem: str, into: int, groups: int, length: int, uneven: bool) -> int:
        """The longest blocks of which groups consist; with `uneven` the last one may be shorter."""
        common = math.gcd(length, into)
        found = [size for size in FORMATS[self.format].blocksizes if common % size == 0]
        if not found or -(-into // length) != groups or (into % length and not uneven):
            raise ValueError(
                f"{stem + self.scale}: expected groups of a multiple of {_SHORTEST} input features, got "
                f"{groups} groups of {into}"
            )
        return max(found)

    def check_beside(
        self, tensors: Mapping[str, Tensor], stem: str, shape: tuple[int, int], length: int
    ) -> None:
        """Raises ValueError for a tensor that is kept aside and does not fit groups of this length."""
        if self.index in tensors:
            check_order(stem + self.index, tensors[self.index], shape[1], length)

    def _zero_points(self, tensors: Mapping[str, Tensor], stem: str, out: int, groups: int) -> Tensor | None:
        """Zero points (out, groups), uint8; None where all are 8, if saving knows that without them."""
        if self.zeros not in tensors and not self.always_zeros:
            return None
        name, words = stem + self.zeros, tensor_of(tensors, stem, self.zeros, torch.int32)
        expect_shape(name, self._in_file(out, groups, 0), words.shape)
        codes = self._points.codes(words + self.zero_shift)
        points = codes[:out]
        if points.device.type != "meta":
            if int(codes[out:].count_nonzero()):
                raise ValueError(f"{name}: expected zeros after the last of {out} zero points, got others")
            if self.always_zeros and bool((points == ZERO_POINT).all()):
                return None
        return points

    def _grouped(self, values: Tensor, out: int, blocks: int, name: str) -> Tensor:
        """What blocks have, (out, groups) by group of so many blocks. Raises ValueError if blocks of one
        group differ."""
        each = values.view(out, -1)
        first = each[:, ::blocks]
        if not torch.equal(first.repeat_interleave(blocks, 1)[:, : each.shape[1]], each):
            raise ValueError(
                f"{name}: expected one value for each group of the file, got a weight that was packed again, "
                f"with {blocks}; leave it dense (merged) to save it"
            )
        return first


def check_order(name: str, index: Tensor, into: int, length: int) -> None:
    """Raises ValueError unless an index of groups has those of consecutive input features."""
    if index.device.type == "meta":
        return
    expect_shape(name, (into,), index.shape)
    if not torch.equal(index.long(), torch.arange(into, device=index.device) // length):
        raise ValueError(
            f"{name}: expected groups of consecutive input features, got another order (desc_act, or "
            "actorder), which cannot be read; quantise the model without it"
        )


def _repeated(of_groups: Tensor, of_block: Tensor) -> Tensor:
    """A new flat tensor with what each block has, given the group of each."""
    return of_groups[:, of_block].view(-1)
