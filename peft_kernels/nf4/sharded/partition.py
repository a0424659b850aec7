"""How a packed weight is partitioned by rows: byte and scale ranges of each rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from ...core.formats import FORMATS


@dataclass(frozen=True)
class Partition:
    """The layout of a weight in cells, the smallest units with bytes and scales of their own.

    For a weight (out_features, in_features) a cell is a block, or with codes of a byte the rows that share
    scales. Blocks run over the flat weight, so a boundary between rows can fall inside a block, which both
    ranks then hold.
    For experts, (experts, out_features, in_features), a row and a cell are one expert.
    """

    shape: tuple[int, ...]
    blocksize: int
    format: str = "nf4"

    @property
    def rows(self) -> int:
        return self.shape[0]

    @cached_property
    def row(self) -> int:
        """Elements per row."""
        return prod(self.shape[1:])

    @cached_property
    def cell(self) -> int:
        """Elements per cell."""
        form, row = FORMATS[self.format], max(self.row, 1)
        if len(self.shape) == 3:
            return row
        return self.blocksize if form.bits == 4 else form.cell(row, self.blocksize)[0] * row

    @cached_property
    def _cell_bytes(self) -> int:
        return FORMATS[self.format].nbytes(self.cell)

    @cached_property
    def _cell_scales(self) -> int:
        form = FORMATS[self.format]
        if len(self.shape) == 3:
            return form.scales(self.shape[1:], self.blocksize)
        return 1 if form.bits == 4 else form.scales((1, self.row), self.blocksize)

    @cached_property
    def nbytes(self) -> int:
        """Packed bytes of the whole weight."""
        if len(self.shape) == 3:
            return self.rows * self._cell_bytes
        return FORMATS[self.format].nbytes(prod(self.shape))

    @cached_property
    def scales(self) -> int:
        """First-level scales of the whole weight."""
        return -(-prod(self.shape) // self.cell) * self._cell_scales

    def cells(self, start: int, stop: int) -> tuple[int, int]:
        """The range of cells that rows [start, stop) touch."""
        first = start * self.row // self.cell
        return first, max(first, -(-stop * self.row // self.cell)) if stop > start else first

    def slices(self, start: int, stop: int) -> tuple[slice, slice]:
        """Slices of the flat packed bytes and of the flat scales for rows [start, stop)."""
        first, last = self.cells(start, stop)
        nbytes, scales = self._cell_bytes, self._cell_scales
        return (
            slice(min(first * nbytes, self.nbytes), min(last * nbytes, self.nbytes)),
            slice(first * scales, last * scales),
        )

    def rows_per_rank(self, count: int) -> int:
        """Rows of each of `count` ranks, as `torch.chunk` splits: the last ones may have fewer or none."""
        return -(-self.rows // count)

    def has_empty_rank(self, count: int) -> bool:
        return len(self.row_ranges(self.rows_per_rank(count))) < count

    def row_ranges(self, rows: int) -> list[tuple[int, int]]:
        """(start, stop) of each chunk of `rows` rows; the last may have fewer."""
        if not rows:
            return []
        return [(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    def max_sizes(self, rows: int) -> tuple[int, int]:
        """Maximum packed bytes and scales of any chunk of `rows` rows."""
        sizes = [[place.stop - place.start for place in self.slices(*part)] for part in self.row_ranges(rows)]
        return max((s[0] for s in sizes), default=0), max((s[1] for s in sizes), default=0)

    def is_cell_aligned(self, rows: int) -> bool:
        """Whether no boundary between chunks of `rows` rows falls inside a cell."""
        return rows * self.row % self.cell == 0 or len(self.row_ranges(rows)) < 2
