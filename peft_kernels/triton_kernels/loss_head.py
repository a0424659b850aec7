"""The head of a loss, as in csrc/cuda/loss/cross_entropy_head.h: its GEMMs, piece by piece, and the rows that
they leave out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core.launch import bypasses_cache
from .linear.linear_pieces import backward_by_pieces, dequantize_part, forward_by_pieces, pieces
from .nf4.nf4_weight import Nf4

LOGIT_BYTES = 256 << 20
"""Of the logits that exist at a time."""
FEW_ROWS = 256
"""Up to here reading the head takes as long as multiplying by it: fewer rows save nothing."""


def logit_pieces(count: int, length: int, itemsize: int) -> Iterator[range]:
    """Pieces of `count` rows of `length` logits each, or columns."""
    return pieces(count, length, itemsize, LOGIT_BYTES)


class Head(NamedTuple):
    """A head of x's dtype, or a packed one: that is dequantised, whatever the number of rows. Kernels that
    multiply packed weights round the codes of NF4, an error that all logits share and that their sums would
    keep."""

    weight: Tensor | Nf4
    bias: Tensor | None
    vocabulary: int
    features: int

    def logits(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Nf4):
            return forward_by_pieces(x, self.weight, self.vocabulary, self.bias)
        return _linear(x, self.weight, self.bias)

    def write_dx(self, d: Tensor, dx: Tensor) -> None:
        if isinstance(self.weight, Nf4):
            dx.copy_(backward_by_pieces(d, self.weight, self.features))
        else:
            torch.mm(d, self.weight, out=dx)

    def by_pieces(self, x: Tensor, itemsize: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of the vocabulary, their rows of the weight, and their logits without an adapter."""
        packed = isinstance(self.weight, Nf4)
        length = max(len(x), self.features) if packed else len(x)
        for rows in logit_pieces(self.vocabulary, length, itemsize):
            part = slice(rows.start, rows.stop)
            if isinstance(self.weight, Nf4):
                weight = x.new_empty(len(rows), self.features)
                dequantize_part(self.weight, self.features, rows, range(self.features), weight)
            else:
                weight = self.weight[part]
            yield part, weight, _linear(x, weight, None if self.bias is None else self.bias[part])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


class Adapter(NamedTuple):
    """Its term is added in fp32: h [rows, r] = scaling x A^T, and B [vocabulary, r]."""

    h: Tensor
    b: Tensor

    def added(self, logits: Tensor, rows: slice, cols: slice) -> Tensor:
        return torch.addmm(logits.float(), self.h[rows], self.b[cols].t())

    def add_gradients(self, d: Tensor, cols: slice, dh: Tensor | None, db: Tensor | None) -> None:
        if dh is not None:
            dh.addmm_(d, self.b[cols])
        if db is not None:
            db[cols] = torch.mm(d.t(), self.h)


def rows_with_label(args: Any) -> Tensor | None:
    """The indices of the rows that have a label. None: all are computed, and those without one have zeros.

    The host waits for the device here, so that the GEMMs of the others can be left out; not during a capture,
    where nothing may wait and a replay may have other labels.
    """
    if len(args.labels) <= FEW_ROWS or bypasses_cache():
        return None
    rows = (args.labels != args.ignore_index).nonzero().squeeze(1)
    return None if len(rows) == len(args.labels) else rows


def chosen(t: Tensor, rows: Tensor | None) -> Tensor:
    """The rows to compute, contiguous."""
    return t.contiguous() if rows is None else t[rows]


def spread(t: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    """The reverse: all rows of a result, with zeros where none was computed."""
    if rows is None:
        return t
    return t.new_zeros(len(x), *t.shape[1:]).index_copy_(0, rows, t)
