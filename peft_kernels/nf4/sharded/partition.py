"""Where the parts of an NF4 weight lie when it is cut between rows, and what each of them has to hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod


@dataclass(frozen=True)
class Cut:
    """The layout of a weight, in cells that have bytes and scales to themselves.

    A cell is a block of a weight (out_features, in_features): blocks run over the flat weight, so a cut
    between rows may go through one, and then both parts hold it. Of experts, (experts, out_features,
    in_features), a row is an expert, and so is a cell.
    """

    shape: tuple[int, ...]
    blocksize: int

    @property
    def rows(self) -> int:
        return self.shape[0]

    @cached_property
    def row(self) -> int:
        """Elements of a row."""
        return prod(self.shape[1:])

    @cached_property
    def cell(self) -> int:
        """Elements of a cell."""
        return self.row if len(self.shape) == 3 else self.blocksize

    @cached_property
    def _cell_bytes(self) -> int:
        return -(-self.cell // 2)

    @cached_property
    def _cell_scales(self) -> int:
        return -(-self.cell // self.blocksize)

    @cached_property
    def nbytes(self) -> int:
        """Packed bytes of the whole."""
        n = prod(self.shape)
        return self.rows * self._cell_bytes if len(self.shape) == 3 else -(-n // 2)

    @cached_property
    def scales(self) -> int:
        """First-level scales of the whole."""
        return -(-prod(self.shape) // self.cell) * self._cell_scales

    def cells(self, start: int, stop: int) -> tuple[int, int]:
        """The first cell that rows [start, stop) touch, and the one behind their last."""
        first = start * self.row // self.cell
        return first, max(first, -(-stop * self.row // self.cell)) if stop > start else first

    def places(self, start: int, stop: int) -> tuple[slice, slice]:
        """Of rows [start, stop): their packed bytes and their scales in the flat whole."""
        first, last = self.cells(start, stop)
        nbytes, scales = self._cell_bytes, self._cell_scales
        return (
            slice(min(first * nbytes, self.nbytes), min(last * nbytes, self.nbytes)),
            slice(first * scales, last * scales),
        )

    def rows_of_part(self, count: int) -> int:
        """Rows of each of `count` parts, but for the last that has any: torch's rule, `torch.chunk`."""
        return -(-self.rows // count)

    def has_empty_part(self, count: int) -> bool:
        return len(self.parts(self.rows_of_part(count))) < count

    def parts(self, rows: int) -> list[tuple[int, int]]:
        """First row, and the one behind the last, of each part of `rows` rows; the last may have fewer."""
        if not rows:
            return []
        return [(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    def largest(self, rows: int) -> tuple[int, int]:
        """The most packed bytes and scales that one of these parts touches."""
        sizes = [[place.stop - place.start for place in self.places(*part)] for part in self.parts(rows)]
        return max((s[0] for s in sizes), default=0), max((s[1] for s in sizes), default=0)

    def is_seamless(self, rows: int) -> bool:
        """Whether no cut between parts of `rows` rows goes through a cell."""
        return rows * self.row % self.cell == 0 or len(self.parts(rows)) < 2
