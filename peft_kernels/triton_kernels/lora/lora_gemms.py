"""The GEMMs of LoRA adapters: shrink (activations to ranks), expand (ranks to features), sums over rows.

Adapters may be fp32 with 16-bit activations; they are not rounded. With `row_group`, rows of other groups
count as zeros, whatever they hold. Activations are contiguous rows. A launch computes several GEMMs; those of
one x are neighbours, so that they find it in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dropout import keep_mask, unpack_mask
from ..core.gemm import add_dot, dot, new_partials, reduce_splits, split_k, store_tile, triton_dtype
from ..core.launch import VARYING, Config, cdiv, config, launch, power_of_2, varying
from ..core.lora_delta import Delta, DeltaArgs, Selection, SelectionArgs, delta_args, delta_tile

MAX_RANKS = 64  # per program
RANKS_OVER_ROWS = 32  # per program that sums over rows: registers hold no more
MAX_SHRINKS, MAX_SUMS, MAX_DELTAS = 2, 4, 2
"""Most GEMMs or deltas per launch: each adds code to the kernel, which takes time to compile. Gate and up of
an MLP with an adapter each have this many."""

# Few rows take small tiles, which waste nothing.
FEW_ROWS = 16
SHRINK_FEW = config(4, 3, BLOCK_M=16)
SHRINK = config(4, 3, BLOCK_M=64)
EXPAND_FEW = config(4, 2, BLOCK_M=16, BLOCK_F=128)
EXPAND = config(8, 2, BLOCK_M=64, BLOCK_F=128)
OVER_ROWS = config(8, 3, BLOCK_F=64)


class Gemm(NamedTuple):
    """For `shrink`: out = scale mask(x) factor, fp32 [m, rank], factor [features, rank]; 0 in rows that are
    not selected. For `over_rows`: out = scale mask(x)^T factor, [features, rank], factor fp32 [m, rank],
    summed over the selected rows."""

    x: Tensor  # [m, features]
    factor: Tensor
    out: Tensor  # any strides
    scale: float
    selection: Selection  # of x


class Job(NamedTuple):
    """`Gemm` for kernels."""

    x: Tensor
    factor: Tensor
    out: Tensor
    features: int
    rank: int
    factor_stride: int
    factor_rank_stride: int
    out_stride: int
    out_rank_stride: int
    scale: float  # times the mask's
    selection: SelectionArgs
    # Varying:
    first: int  # its first program
    programs: int
    splits: int
    split: int  # units that a program sums


@triton.jit
def selects(selection, row, m):
    """Which of `row`, int64, an adapter serves."""
    there = row < m
    if selection.row_group is not None:
        there &= tl.load(selection.row_group + row, mask=there, other=0) == (selection.group >> 4)
    return there


@triton.jit
def load_selected(job, row, there, first, QUADS: tl.constexpr, BLOCK_F: tl.constexpr):
    """BLOCK_F features of x[m, features] from `first` on, 0 where dropout drops them and in rows that are not
    `there`."""
    feature = first + tl.arange(0, BLOCK_F)
    inside = there[:, None] & (feature < job.features)[None, :]
    tile = tl.load(job.x + row[:, None] * job.features + feature[None, :], mask=inside, other=0.0)
    if job.selection.mask.seed is not None:
        mask = unpack_mask(job.selection.mask)
        tile = tl.where(keep_mask(mask, row, first, job.features, BLOCK_F, QUADS), tile, 0.0)
    return tile


@triton.jit
def shrink_sum(job, row, there, r, begin, end, QUADS: tl.constexpr, BLOCK_F: tl.constexpr):
    """mask(x) factor [rows, ranks], summed over features `begin` to `end`."""
    acc = tl.zeros((row.shape[0], r.shape[0]), tl.float32)
    for start in range(begin, end, BLOCK_F):
        tile = load_selected(job, row, there, start, QUADS, BLOCK_F)
        feature = start + tl.arange(0, BLOCK_F)
        at = feature.to(tl.int64)[:, None] * job.factor_stride
        at += r.to(tl.int64)[None, :] * job.factor_rank_stride
        inside = (feature < job.features)[:, None] & (r < job.rank)[None, :]
        acc = add_dot(acc, dot(tile, tl.load(job.factor + at, mask=inside, other=0.0), tl.float32))
    return acc


@triton.jit
def shrink_tile(
    job,
    program,
    parts,
    m,
    QUADS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    splits = job.splits >> 4
    split = program % splits
    row_tiles = tl.cdiv(m, BLOCK_M)
    row = (program // splits % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = program // splits // row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    there = selects(job.selection, row, m)
    depth = (job.split >> 4) * BLOCK_F
    begin = split * depth
    acc = shrink_sum(job, row, there, r, begin, tl.minimum(begin + depth, job.features), QUADS, BLOCK_F)
    # Zeros times Inf or NaN of the factor are not zeros.
    acc = tl.where(there[:, None], acc * job.scale, 0.0)
    total, last = reduce_splits(acc, parts, (job.first >> 4) + program - split, split, splits)
    at = job.out + row[:, None] * job.out_stride + r[None, :]
    tl.store(at, total, mask=(row < m)[:, None] & (r < job.rank)[None, :] & last)


@triton.jit(do_not_specialize=VARYING)
def shrink_kernel(
    jobs,
    parts,
    m,
    JOBS: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[m, rank] = scale mask(x)[m, features] factor[features, rank] for each job; QUADS: one per job."""
    for i in tl.static_range(JOBS):
        program = tl.program_id(0) - (jobs[i].first >> 4)
        if (program >= 0) & (program < (jobs[i].programs >> 4)):
            shrink_tile(jobs[i], program, parts, m, QUADS[i], BLOCK_F, BLOCK_R, BLOCK_M)


@triton.jit(do_not_specialize=VARYING)
def expand_kernel(
    total_ptr,
    terms,
    deltas,
    selection,
    out_ptr,
    m,
    features,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = total + terms + masks(deltas), each delta masked and only in the rows of its
    `selection`. Each operand may be None; `out` may be one of the addends. DTYPE: of the activations."""
    row_tiles = tl.cdiv(m, BLOCK_M)
    token = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)
    first = tl.program_id(0) // row_tiles * BLOCK_F
    feature = first + tl.arange(0, BLOCK_F)
    at = row[None, :] * features + feature[:, None]
    inside = (feature < features)[:, None] & (token < m)[None, :]
    sum = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    if total_ptr is not None:
        sum += tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if terms is not None:
        for i in tl.static_range(len(terms)):
            sum += tl.load(terms[i] + at, mask=inside, other=0.0).to(tl.float32)
    if deltas is not None:
        for i in tl.static_range(len(deltas)):
            own = deltas[i].scale * delta_tile(deltas[i], token, m, feature, features, DTYPE, BLOCK_R)
            there = selects(selection[i], row, m)[None, :]
            if selection[i].mask.seed is not None:
                mask = unpack_mask(selection[i].mask)
                there &= tl.trans(keep_mask(mask, row, first, features, BLOCK_F, QUADS))
            sum += tl.where(there, own, 0.0)
    store_tile(out_ptr, sum, token, m, feature, features, True)


@triton.jit
def over_rows_tile(
    job,
    program,
    parts,
    m,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    splits = job.splits >> 4
    split = program % splits
    feature_tiles = tl.cdiv(job.features, BLOCK_F)
    first_feature = program // splits % feature_tiles * BLOCK_F
    r = program // splits // feature_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    depth = (job.split >> 4) * BLOCK_M
    begin = split * depth
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for start in range(begin, tl.minimum(begin + depth, m), BLOCK_M):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        there = selects(job.selection, row, m)
        tile = load_selected(job, row, there, first_feature, QUADS, BLOCK_F)
        inside = there[:, None] & (r < job.rank)[None, :]
        at = row[:, None] * job.factor_stride + r[None, :]
        ranks = tl.load(job.factor + at, mask=inside, other=0.0)
        acc = add_dot(acc, dot(tl.trans(tile), ranks, tl.float32))
    total, last = reduce_splits(acc, parts, (job.first >> 4) + program - split, split, splits)
    feature = first_feature + tl.arange(0, BLOCK_F)
    at = job.out + feature.to(tl.int64)[:, None] * job.out_stride
    at += r.to(tl.int64)[None, :] * job.out_rank_stride
    inside = (feature < job.features)[:, None] & (r < job.rank)[None, :] & last
    tl.store(at, (total * job.scale).to(job.out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def over_rows_kernel(
    jobs,
    parts,
    m,
    JOBS: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[features, rank] = scale mask(x)[m, features]^T factor[m, rank] for each job; QUADS: one per job."""
    for i in tl.static_range(JOBS):
        program = tl.program_id(0) - (jobs[i].first >> 4)
        if (program >= 0) & (program < (jobs[i].programs >> 4)):
            over_rows_tile(jobs[i], program, parts, m, QUADS[i], BLOCK_M, BLOCK_R, BLOCK_F)


def shrink(gemms: Sequence[Gemm]) -> None:
    """See `Gemm`. All have the same number of rows."""
    for some in _at_once(gemms, MAX_SHRINKS):
        m = some[0].x.shape[0]
        tiles = SHRINK_FEW if m <= FEW_ROWS else SHRINK
        sizes = [(m, p.x.shape[1]) for p in some]
        _launch(shrink_kernel, some, tiles, "BLOCK_F", tiles["BLOCK_M"], sizes, MAX_RANKS)


def over_rows(gemms: Sequence[Gemm]) -> None:
    """See `Gemm`. All have the same number of rows."""
    for some in _at_once(gemms, MAX_SUMS):
        m = some[0].x.shape[0]
        block_f = OVER_ROWS["BLOCK_F"]
        sizes = [(p.x.shape[1], m) for p in some]
        _launch(over_rows_kernel, some, OVER_ROWS, "BLOCK_M", block_f, sizes, RANKS_OVER_ROWS)


def _at_once(gemms: Sequence[Gemm], count: int) -> Iterator[Sequence[Gemm]]:
    gemms = [gemm for gemm in gemms if gemm.out.numel()]
    for begin in range(0, len(gemms), count):
        yield gemms[begin : begin + count]


def _launch(
    kernel: Callable[..., Any],
    gemms: Sequence[Gemm],
    tiles: Config,
    unit_name: str,
    block: int,
    sizes: Sequence[tuple[int, int]],
    most_ranks: int,
) -> None:
    """Launches GEMMs of `sizes`: tiles take `block` of the first size, and sums run over the second in steps
    of `unit_name`. How a GEMM is split does not depend on the others."""
    x = gemms[0].x
    unit = 32 if x.dtype == torch.float32 else 64
    ranks = [gemm.out.shape[1] for gemm in gemms]
    block_r = min(rank_block(max(ranks)), most_ranks)
    jobs: list[Job] = []
    first, cut = 0, False
    for gemm, (size, depth), rank in zip(gemms, sizes, ranks, strict=True):
        alone = cdiv(size, block) * cdiv(rank, min(rank_block(rank), most_ranks))
        features = gemm.x.shape[1]
        units, splits = split_k(alone, depth, unit, x.device)
        programs = cdiv(size, block) * cdiv(rank, block_r) * splits
        counts = varying(first), varying(programs), varying(splits), varying(units)
        tensors, scale = (gemm.x, gemm.factor, gemm.out), gemm.scale * gemm.selection.scale
        (f, f_rank), (o, o_rank) = gemm.factor.stride(), gemm.out.stride()
        numbers = features, rank, f, f_rank, o, o_rank
        jobs.append(Job(*tensors, *numbers, scale, gemm.selection.args, *counts))
        first += programs
        cut = cut or splits > 1
    parts = new_partials(first, block * block_r, x.device) if cut else None
    # One per GEMM: how the mask is computed affects the compiler's order of summation.
    quads = tuple(gemm.x.shape[1] % 4 == 0 for gemm in gemms)
    blocks = {"JOBS": len(jobs), "QUADS": quads, unit_name: unit, "BLOCK_R": block_r}
    launch(kernel, (first,), tuple(jobs), parts, x.shape[0], config=tiles, **blocks)


def sum_with_deltas(terms: Sequence[Tensor], deltas: Sequence[Delta]) -> Tensor:
    """The sum of `terms` [m, features], at least one, and `deltas`, in fp32 and rounded once, written to the
    first term."""
    first = terms[0]
    if len(terms) == 1 and not deltas:
        return first
    count = max(len(terms), len(deltas))
    total = None
    for begin in range(0, count, MAX_DELTAS):
        end = begin + MAX_DELTAS
        if end >= count:
            out = first
        else:
            out = torch.empty_like(first, dtype=torch.float32) if total is None else total
        _expand(total, terms[begin:end], deltas[begin:end], out, first.dtype)
        total = out
    return first


def _expand(
    total: Tensor | None, terms: Sequence[Tensor], deltas: Sequence[Delta], out: Tensor, dtype: torch.dtype
) -> None:
    """out = total + terms + deltas, for activations of `dtype`."""
    m, features = out.shape
    in_fp32 = dtype == torch.float32
    tiles = EXPAND_FEW if m <= FEW_ROWS or in_fp32 else EXPAND  # large tiles would need too many registers
    grid = (cdiv(m, tiles["BLOCK_M"]) * cdiv(features, tiles["BLOCK_F"]), 1)
    found: tuple[DeltaArgs, ...] = tuple(filter(None, map(delta_args, deltas)))
    selection = tuple(delta.selection.args for delta in deltas)
    args = total, tuple(terms) or None, found or None, selection or None, out, m, features
    block_r = summed_rank_block(max((delta.v.shape[1] for delta in deltas), default=0), dtype)
    constants = {"DTYPE": triton_dtype(dtype), "QUADS": features % 4 == 0}
    launch(expand_kernel, grid, *args, config=tiles, BLOCK_R=block_r, **constants)


def rank_block(rank: int) -> int:
    return min(max(power_of_2(rank), 16), MAX_RANKS)


def summed_rank_block(rank: int, dtype: torch.dtype) -> int:
    """Ranks that `delta_tile` sums per step: a longer chain of sums would show in an fp32 result."""
    return min(rank_block(rank), 16) if dtype == torch.float32 else rank_block(rank)
