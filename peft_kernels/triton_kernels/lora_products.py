"""Launches of the products of LoRA adapters. Activations are rows, contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapters import Delta, Mask, Served, mask_args, mask_scale, served_args
from .launch import config, launch
from .lora_kernels import from_ranks_kernel, over_rows_kernel, to_ranks_kernel
from .sums import split_sum

MAX_RANKS = 64  # of a program


FEW_ROWS = 16
TO_RANKS_FEW = [config(4, 3, BLOCK_M=16)]
TO_RANKS = [config(4, 3, BLOCK_M=64), config(4, 2, BLOCK_M=32), config(8, 3, BLOCK_M=128)]
OVER_ROWS = [config(4, 3, BLOCK_F=64), config(8, 2, BLOCK_F=128)]
# One of each: its result may be what it adds to, and then it cannot be run again for its time.
FROM_RANKS_FEW = [config(4, 2, BLOCK_M=16, BLOCK_F=128)]
FROM_RANKS = [config(8, 2, BLOCK_M=64, BLOCK_F=128)]


def to_ranks(
    x: Tensor, v: Tensor, out: Tensor, scale: float, mask: Mask | None, served: Served | None
) -> None:
    """out = scale mask(x) v, fp32 [m, rank], with x [m, features] and v [features, rank]; 0 in rows that are
    not served."""
    if out.numel() == 0:
        return
    (m, features), rank = x.shape, v.shape[1]
    configs = TO_RANKS_FEW if m <= FEW_ROWS else TO_RANKS
    block_f, block_r = _depth(x), _ranks(rank)
    rank_tiles = triton.cdiv(rank, block_r)
    programs = triton.cdiv(m, configs[0].kwargs["BLOCK_M"]) * rank_tiles
    split = split_sum(programs, features, block_f, out)
    launch(
        to_ranks_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * rank_tiles, split.count),
        x,
        v,
        split.target,
        m,
        features,
        rank,
        split.depth,
        *v.stride(),
        split.target.stride(-2),
        scale * mask_scale(mask),
        *served_args(served),
        *mask_args(mask),
        configs=configs,
        key=(m <= FEW_ROWS, features, rank, mask is None, v.stride(1) == 1),
        SPLIT=split.count > 1,
        QUADS=features % 4 == 0,
        BLOCK_F=block_f,
        BLOCK_R=block_r,
    )
    split.finish()


def sum_with_deltas(terms: Sequence[Tensor], deltas: Sequence[Delta]) -> Tensor:
    """The sum of `terms` [m, features], at least one, and `deltas`: in fp32, rounded once. In the memory of
    the first term."""
    first = terms[0]
    if len(terms) == 1 and not deltas:
        return first
    steps = list(zip_longest(terms, deltas))
    total = None
    for term, delta in steps[:-1]:
        out = torch.empty_like(first, dtype=torch.float32) if total is None else total
        _from_ranks(total, term, delta, out, first.dtype)
        total = out
    _from_ranks(total, *steps[-1], first, first.dtype)
    return first


def _from_ranks(
    total: Tensor | None, term: Tensor | None, delta: Delta | None, out: Tensor, dtype: torch.dtype
) -> None:
    """out = total + term + delta, of activations of `dtype`."""
    m, features = out.shape
    u, v, _, mask, served = (None,) * 5 if delta is None else delta
    rank = 0 if v is None else v.shape[1]
    launch(
        from_ranks_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(features, meta["BLOCK_F"]),),
        total,
        term,
        u,
        v,
        out,
        m,
        features,
        rank,
        0 if u is None else u.stride(0),
        *((0, 0) if v is None else v.stride()),
        1.0 if delta is None else delta.factor,
        *served_args(served),
        *mask_args(mask),
        configs=FROM_RANKS_FEW if m <= FEW_ROWS else FROM_RANKS,
        DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
        QUADS=features % 4 == 0,
        BLOCK_R=_ranks(rank),
    )


def over_rows(
    x: Tensor, u: Tensor, out: Tensor, scale: float, mask: Mask | None, served: Served | None
) -> None:
    """out = scale mask(x)^T u, [features, rank], contiguous or the transpose of such, over rows that are
    served; with x [m, features] and u [m, rank] in fp32."""
    if out.numel() == 0:
        return
    (m, features), rank = x.shape, u.shape[1]
    block_m, block_r = _depth(x), _ranks(rank)
    rank_tiles = triton.cdiv(rank, block_r)
    programs = triton.cdiv(features, OVER_ROWS[0].kwargs["BLOCK_F"]) * rank_tiles
    split = split_sum(programs, m, block_m, out if out.is_contiguous() else out.t())
    launch(
        over_rows_kernel,
        lambda meta: (triton.cdiv(features, meta["BLOCK_F"]) * rank_tiles, split.count),
        x,
        u,
        split.target,
        m,
        features,
        rank,
        split.depth,
        u.stride(0),
        *out.stride(),
        scale * mask_scale(mask),
        *served_args(served),
        *mask_args(mask),
        configs=OVER_ROWS,
        key=(features, rank, split.count > 1, mask is None, out.stride(1) == 1),
        SPLIT=split.count > 1,
        QUADS=features % 4 == 0,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
    )
    split.finish()


def _depth(x: Tensor) -> int:
    """How many terms of a sum a program takes at a time."""
    return 32 if x.dtype == torch.float32 else 64


def _ranks(rank: int) -> int:
    return min(max(triton.next_power_of_2(rank), 16), MAX_RANKS)
