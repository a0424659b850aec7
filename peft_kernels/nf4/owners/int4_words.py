"""Codes of 4 bits in words of 32, in the orders of GPTQ, AWQ and compressed-tensors, and in ours.

A file has a matrix (out, columns) of codes, or its transpose, with 8 codes of a row or of a column in each
word. We have two codes of a row in each byte, the first in the high nibble.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .owner import swapped

NATURAL = (0, 1, 2, 3, 4, 5, 6, 7)
PER_WORD = 8

_PART = 1 << 24  # codes converted at a time


@dataclass(frozen=True)
class Words:
    """How words hold the codes of a matrix (out, columns)."""

    axis: int  # of the matrix, along which a word holds codes
    transposed: bool = False  # the file has the transpose of the matrix
    order: tuple[int, ...] = NATURAL  # which of 8 codes is in a word's bits 0 to 3, 4 to 7, ...

    def shape(self, words: torch.Size) -> tuple[int, int]:
        """The shape of the matrix, if all words are full."""
        shape = list(reversed(words) if self.transposed else words)
        shape[self.axis] *= PER_WORD
        return shape[0], shape[1]

    def codes(self, words: Tensor) -> Tensor:
        """The matrix of codes, uint8 (out, columns)."""
        rows = self._rows(words)
        halves = _bytes(rows)
        codes = torch.stack((halves & 15, halves >> 4), -1).view(*rows.shape, PER_WORD)
        if self.order != NATURAL:
            codes = codes[..., [self.order.index(i) for i in range(PER_WORD)]]
        codes = codes.flatten(1)
        return codes.T if self.axis == 0 else codes

    def of_codes(self, codes: Tensor) -> Tensor:
        """The words of a matrix of codes; what is left of the last ones is 0."""
        rows = codes.T if self.axis == 0 else codes
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % PER_WORD))
        rows = rows.unflatten(1, (-1, PER_WORD))
        if self.order != NATURAL:
            rows = rows[..., list(self.order)]
        halves = rows[..., ::2] | rows[..., 1::2] << 4
        return self._back(halves.contiguous().view(torch.int32).squeeze(-1))

    def packed(self, words: Tensor) -> Tensor:
        """The matrix in our order, uint8 (out, columns / 2)."""
        out, columns = self.shape(words.shape)
        found = torch.empty(out, columns // 2, dtype=torch.uint8, device=words.device)
        for begin, end in self._parts(out, columns):
            part = self._columns(words, begin, end)
            if self.axis == 1 and self.order == NATURAL:
                found[begin:end] = swapped(_bytes(self._rows(part))).view(end - begin, -1)
            else:
                codes = self.codes(part)
                found[begin:end] = codes[:, ::2] << 4 | codes[:, 1::2]
        return found

    def of_packed(self, packed: Tensor) -> Tensor:
        """The words of a matrix in our order."""
        out, columns = packed.shape[0], packed.shape[1] * 2
        shape = [out, columns]
        shape[self.axis] //= PER_WORD
        found = packed.new_empty(*(reversed(shape) if self.transposed else shape), dtype=torch.int32)
        for begin, end in self._parts(out, columns):
            part = packed[begin:end]
            if self.axis == 1 and self.order == NATURAL:
                words = self._back(swapped(part).view(torch.int32))
            else:
                words = self.of_codes(torch.stack((part >> 4, part & 15), -1).flatten(1))
            self._columns(found, begin, end).copy_(words)
        return found

    def _rows(self, words: Tensor) -> Tensor:
        """The words with those of 8 codes after each other in a row."""
        return (words if self.transposed == (self.axis == 0) else words.T).contiguous()

    def _back(self, rows: Tensor) -> Tensor:
        return rows if self.transposed == (self.axis == 0) else rows.T

    def _columns(self, words: Tensor, begin: int, end: int) -> Tensor:
        """The words of rows of the matrix."""
        if self.axis == 0:
            begin, end = begin // PER_WORD, end // PER_WORD
        return words[:, begin:end] if self.transposed else words[begin:end]

    @staticmethod
    def _parts(out: int, columns: int) -> Iterator[tuple[int, int]]:
        step = max(_PART // max(columns, 1) // PER_WORD, 1) * PER_WORD
        for begin in range(0, out, step):
            yield begin, min(begin + step, out)


def _bytes(words: Tensor) -> Tensor:
    """The bytes of words, flat, the lowest of each first."""
    return words.view(-1).view(torch.uint8)
