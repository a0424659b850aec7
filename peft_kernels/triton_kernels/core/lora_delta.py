"""LoRA adapters as kernels see them, and the tile of u v^T that they add to a GEMM. Layers share x, and each
has any number of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check, check_dtype, check_float, check_lengths, check_shape
from .dropout import Mask, MaskArgs, check_dropout, pack_mask
from .gemm import add_dot, dot
from .launch import varying


class RowGroup(NamedTuple):
    """The rows of one group, in a batch that mixes several."""

    row_group: Tensor  # int64 [m], contiguous
    group: int


class Selection(NamedTuple):
    """The activations that an adapter sees: elements that dropout keeps, in the rows that it serves."""

    mask: Mask | None = None
    rows: RowGroup | None = None  # None: all rows

    @property
    def scale(self) -> float:
        """Factor of the elements that dropout keeps."""
        return 1.0 if self.mask is None else self.mask.scale

    @property
    def without_mask(self) -> Selection:
        return Selection(None, self.rows)

    @property
    def args(self) -> SelectionArgs:
        row_group, group = (None, 0) if self.rows is None else self.rows
        return SelectionArgs(row_group, varying(group), pack_mask(self.mask))


class SelectionArgs(NamedTuple):
    """`Selection` for kernels."""

    row_group: Tensor | None
    group: int  # varying
    mask: MaskArgs


class Adapter(NamedTuple):
    """One adapter. `columns` are its columns in h = mask(x) A^T and dh = scaling dY B, which are 0 in rows
    that it does not serve."""

    a: Tensor  # [rank, k], contiguous like b, and fp32 or of the activations' type
    b: Tensor  # [n, rank]
    layer: int
    scaling: float
    selection: Selection  # of x; for dy without the mask
    columns: slice

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Delta(NamedTuple):
    """What an adapter adds to a GEMM: scale * mask(u v^T), in the rows that it serves."""

    u: Tensor  # fp32 [m, rank], any row stride
    v: Tensor  # [features, rank], B forward and A transposed backward
    scale: float
    selection: Selection


class DeltaArgs(NamedTuple):
    """`Delta` for kernels, without mask and rows."""

    u: Tensor
    v: Tensor
    u_stride: int
    v_stride: int
    v_rank_stride: int
    rank: int
    scale: float  # times the mask's


def delta_args(delta: Delta | None) -> DeltaArgs | None:
    if delta is None:
        return None
    u, v, scale, selection = delta
    return DeltaArgs(u, v, u.stride(0), v.stride(0), v.stride(1), v.shape[1], scale * selection.scale)


@triton.jit
def delta_tile(delta, token, m, feature, features, result: tl.constexpr, BLOCK_R: tl.constexpr):
    """v u^T [features, tokens] of a delta, for a result of dtype `result`."""
    u_rows = tl.minimum(token, m - 1).to(tl.int64) * delta.u_stride
    v_rows = tl.minimum(feature, features - 1).to(tl.int64) * delta.v_stride
    sum = tl.zeros((feature.shape[0], token.shape[0]), tl.float32)
    for first in range(0, delta.rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside = (r < delta.rank)[None, :]
        u = tl.load(delta.u + u_rows[:, None] + r[None, :], mask=inside, other=0.0)
        at = v_rows[:, None] + r.to(tl.int64)[None, :] * delta.v_rank_stride
        v = tl.load(delta.v + at, mask=inside, other=0.0)
        sum = add_dot(sum, dot(v, tl.trans(u), result))
    return sum


def adapters_of(args: Any, x: Tensor) -> list[Adapter]:
    """The adapters of an op's layers on x [m, k]. Raises RuntimeError when they do not fit."""
    layers, row_group = len(args.bases), args.row_group
    factors = args.lora_a, args.lora_b, args.layer, args.dropout_p
    lists = (*factors[1:], args.scaling, args.group)
    check_lengths(lists, len(args.lora_a), "lora_b, layer, dropout_p, scaling, group", "lora_a")
    if row_group is not None:
        check_dtype(row_group, torch.int64, "row_group")
        check_shape(row_group, x.shape[:1], "row_group")
        row_group = row_group.contiguous()
    adapters: list[Adapter] = []
    for i, (a, b, j, p) in enumerate(zip(*factors, strict=True)):
        check_factor(a, x.dtype, "lora_a")
        check_factor(b, x.dtype, "lora_b")
        check(0 <= j < layers, "layer", f"0 to {layers - 1}", j)
        check_shape(a, (a.shape[0], x.shape[1]), "lora_a")
        check_shape(b, (b.shape[0], a.shape[0]), "lora_b")
        check_dropout(p, args.seed)
        mask = None if p == 0 or args.seed is None else Mask(args.seed, i, p)
        selection = Selection(mask, None if row_group is None else RowGroup(row_group, args.group[i]))
        first = adapters[-1].columns.stop if adapters else 0
        columns = slice(first, first + a.shape[0])
        adapters.append(Adapter(a.contiguous(), b.contiguous(), j, args.scaling[i], selection, columns))
    return adapters


def check_outputs(adapters: Sequence[Adapter], out_features: Sequence[int]) -> None:
    """Raises unless the adapters fit the outputs of their layers."""
    for adapter in adapters:
        check_shape(adapter.b, (out_features[adapter.layer], adapter.rank), "lora_b")


def check_factor(t: Tensor, dtype: torch.dtype, name: str, dims: int = 2) -> None:
    """Raises unless an adapter's factor fits activations of `dtype`."""
    check_float(t, name)
    check(t.dim() == dims, name, f"{dims} dimensions", t.dim())
    if t.dtype != torch.float32:
        check_dtype(t, dtype, name)
