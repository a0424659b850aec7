"""LoRA adapters as kernels see them: layers share x, and each has any number of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dropout import dropout_scale, dropout_threshold
from .common import check, check_dtype, check_float, check_lengths, check_shape
from .dropout import check_dropout


class Mask(NamedTuple):
    """Dropout as in reference/dropout.py."""

    seed: Tensor
    stream: int
    p: float

    @property
    def threshold(self) -> int:
        return dropout_threshold(self.p)

    @property
    def scale(self) -> float:
        return dropout_scale(self.p)


class Served(NamedTuple):
    """The rows of one group, of a batch in which several are mixed."""

    row_group: Tensor  # int64 [m], contiguous
    group: int


class Adapter(NamedTuple):
    """Its columns in h = mask(x) A^T and in dh = scaling dY B, which are 0 in rows that it does not serve,
    are `columns`."""

    a: Tensor  # [rank, k], contiguous like b, and fp32 or of the activations' type
    b: Tensor  # [n, rank]
    layer: int
    scaling: float
    mask: Mask | None
    served: Served | None  # None: it serves all rows
    columns: slice

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Delta(NamedTuple):
    """What an adapter adds to a product: scale * mask(u v^T), in the rows that it serves."""

    u: Tensor  # fp32 [m, rank], rows may lie apart
    v: Tensor  # [features, rank], B forward and A transposed backward
    scale: float
    mask: Mask | None = None
    served: Served | None = None

    @property
    def factor(self) -> float:
        """Of what the mask keeps."""
        return self.scale * mask_scale(self.mask)


def mask_scale(mask: Mask | None) -> float:
    return 1.0 if mask is None else mask.scale


def mask_args(mask: Mask | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if mask is None else (mask.seed, mask.stream, mask.threshold)


def served_args(served: Served | None) -> tuple[Tensor | None, int]:
    return (None, 0) if served is None else served


def adapters_of(
    x: Tensor,
    layers: int,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    layer: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    group: Sequence[int],
    row_group: Tensor | None,
) -> list[Adapter]:
    """The arguments that make adapters of `layers` layers on x [m, k]. RuntimeError when they do not fit."""
    lists = (lora_b, layer, scaling, dropout_p, group)
    check_lengths(lists, len(lora_a), "lora_b, layer, scaling, dropout_p, group", "lora_a")
    if row_group is not None:
        check_dtype(row_group, torch.int64, "row_group")
        check_shape(row_group, x.shape[:1], "row_group")
        row_group = row_group.contiguous()
    adapters: list[Adapter] = []
    for i, (a, b, j, p) in enumerate(zip(lora_a, lora_b, layer, dropout_p, strict=True)):
        _check_factor(a, x.dtype, "lora_a")
        _check_factor(b, x.dtype, "lora_b")
        check(0 <= j < layers, "layer", f"0 to {layers - 1}", j)
        check_shape(a, (a.shape[0], x.shape[1]), "lora_a")
        check_shape(b, (b.shape[0], a.shape[0]), "lora_b")
        check_dropout(p, seed)
        mask = None if p == 0 or seed is None else Mask(seed, i, p)
        served = None if row_group is None else Served(row_group, group[i])
        first = adapters[-1].columns.stop if adapters else 0
        columns = slice(first, first + a.shape[0])
        adapters.append(Adapter(a.contiguous(), b.contiguous(), j, scaling[i], mask, served, columns))
    return adapters


def check_outputs(adapters: Sequence[Adapter], out_features: Sequence[int]) -> None:
    """That adapters fit the outputs of their layers."""
    for adapter in adapters:
        check_shape(adapter.b, (out_features[adapter.layer], adapter.rank), "lora_b")


def _check_factor(t: Tensor, dtype: torch.dtype, name: str) -> None:
    check_float(t, name)
    check(t.dim() == 2, name, "2 dimensions", t.dim())
    if t.dtype != torch.float32:
        check_dtype(t, dtype, name)
