"""The products of LoRA adapters: shrink (activations to ranks), expand (ranks to features), sums over rows.

Adapters may be in fp32 beside 16-bit activations, and are not rounded then. With `row_group` the rows of
other groups count as zeros, whatever they hold. Activations are rows, contiguous. A launch computes several
products: each program works on one, and those of an x, which lie side by side, find it in the card's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.launch import VARYING, Config, cdiv, config, launch, power_of_2, varying
from ..core.products import add_part, dot, parts_of, split_sum, store_tile, sum_splits, type_of
from .dropout import kept, known_mask
from .lora_adapters import Delta, DeltaArgs, Seen, SeenArgs, delta_args, delta_tile

MAX_RANKS = 64  # of a program
RANKS_OVER_ROWS = 32  # of one that sums over rows: 64 features and twice as many in parts leave no registers
SHRINKS, SUMS, DELTAS = 2, 4, 2
"""Of one launch, at most: each is code of its own in the kernel, which takes time to compile. Gate and up of
an MLP with an adapter each have so many."""

# Few rows make small tiles, of which nothing is wasted.
FEW_ROWS = 16
SHRINK_FEW = config(4, 3, BLOCK_M=16)
SHRINK = config(4, 3, BLOCK_M=64)
EXPAND_FEW = config(4, 2, BLOCK_M=16, BLOCK_F=128)
EXPAND = config(8, 2, BLOCK_M=64, BLOCK_F=128)
OVER_ROWS = config(8, 3, BLOCK_F=64)


class Product(NamedTuple):
    """`shrink`: out = scale mask(x) factor, fp32 [m, rank], of a factor [features, rank]; 0 in rows that are
    not served. `over_rows`: out = scale mask(x)^T factor, [features, rank], of a factor [m, rank] in fp32,
    over rows that are served."""

    x: Tensor  # [m, features]
    factor: Tensor
    out: Tensor  # rows, or columns, may lie apart
    scale: float
    seen: Seen  # of x


class Job(NamedTuple):
    """A product for kernels."""

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
    seen: SeenArgs
    # Varying:
    first: int  # program
    programs: int
    splits: int
    split: int  # units of a program's sum


@triton.jit
def is_served(seen, row, m):
    """Which of `row`, int64, are rows of an adapter."""
    there = row < m
    if seen.row_group is not None:
        there &= tl.load(seen.row_group + row, mask=there, other=0) == (seen.group >> 4)
    return there


@triton.jit
def load_seen(job, row, there, first, QUADS: tl.constexpr, BLOCK_F: tl.constexpr):
    """x[m, features] as an adapter sees it: elements that dropout drops, and those of rows that are not
    `there`, are 0. Features from `first` on."""
    feature = first + tl.arange(0, BLOCK_F)
    inside = there[:, None] & (feature < job.features)[None, :]
    tile = tl.load(job.x + row[:, None] * job.features + feature[None, :], mask=inside, other=0.0)
    if job.seen.mask.seed is not None:
        mask = known_mask(job.seen.mask)
        tile = tl.where(kept(mask, row, first, job.features, BLOCK_F, QUADS), tile, 0.0)
    return tile


@triton.jit
def rank_sum(job, row, there, r, begin, end, QUADS: tl.constexpr, BLOCK_F: tl.constexpr):
    """mask(x) factor [rows, ranks], summed over features from `begin` to `end`."""
    acc = tl.zeros((row.shape[0], r.shape[0]), tl.float32)
    for start in range(begin, end, BLOCK_F):
        tile = load_seen(job, row, there, start, QUADS, BLOCK_F)
        feature = start + tl.arange(0, BLOCK_F)
        at = feature.to(tl.int64)[:, None] * job.factor_stride
        at += r.to(tl.int64)[None, :] * job.factor_rank_stride
        inside = (feature < job.features)[:, None] & (r < job.rank)[None, :]
        acc = add_part(acc, dot(tile, tl.load(job.factor + at, mask=inside, other=0.0), tl.float32))
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
    there = is_served(job.seen, row, m)
    depth = (job.split >> 4) * BLOCK_F
    begin = split * depth
    acc = rank_sum(job, row, there, r, begin, tl.minimum(begin + depth, job.features), QUADS, BLOCK_F)
    # Where the factor has Inf or NaN, zeros times it are not zeros.
    acc = tl.where(there[:, None], acc * job.scale, 0.0)
    total, last = sum_splits(acc, parts, (job.first >> 4) + program - split, split, splits)
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
    """out[m, rank] = scale mask(x)[m, features] factor[features, rank] of each job, and so QUADS."""
    for i in tl.static_range(JOBS):
        program = tl.program_id(0) - (jobs[i].first >> 4)
        if (program >= 0) & (program < (jobs[i].programs >> 4)):
            shrink_tile(jobs[i], program, parts, m, QUADS[i], BLOCK_F, BLOCK_R, BLOCK_M)


@triton.jit(do_not_specialize=VARYING)
def expand_kernel(
    total_ptr,
    terms,
    deltas,
    seen,
    out_ptr,
    m,
    features,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[m, features] = total + terms + masks(deltas), each delta as its `seen` says: masked, and in rows
    that are served alone. None is none; `out` may be one of the addends. DTYPE: of the activations."""
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
            there = is_served(seen[i], row, m)[None, :]
            if seen[i].mask.seed is not None:
                mask = known_mask(seen[i].mask)
                there &= tl.trans(kept(mask, row, first, features, BLOCK_F, QUADS))
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
        there = is_served(job.seen, row, m)
        tile = load_seen(job, row, there, first_feature, QUADS, BLOCK_F)
        inside = there[:, None] & (r < job.rank)[None, :]
        at = row[:, None] * job.factor_stride + r[None, :]
        ranks = tl.load(job.factor + at, mask=inside, other=0.0)
        acc = add_part(acc, dot(tl.trans(tile), ranks, tl.float32))
    total, last = sum_splits(acc, parts, (job.first >> 4) + program - split, split, splits)
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
    """out[features, rank] = scale mask(x)[m, features]^T factor[m, rank] of each job, and so QUADS."""
    for i in tl.static_range(JOBS):
        program = tl.program_id(0) - (jobs[i].first >> 4)
        if (program >= 0) & (program < (jobs[i].programs >> 4)):
            over_rows_tile(jobs[i], program, parts, m, QUADS[i], BLOCK_M, BLOCK_R, BLOCK_F)


def shrink(products: Sequence[Product]) -> None:
    """See `Product`. All of as many rows."""
    for some in _at_once(products, SHRINKS):
        m = some[0].x.shape[0]
        tiles = SHRINK_FEW if m <= FEW_ROWS else SHRINK
        sizes = [(m, p.x.shape[1]) for p in some]
        _launch(shrink_kernel, some, tiles, "BLOCK_F", tiles["BLOCK_M"], sizes, MAX_RANKS)


def over_rows(products: Sequence[Product]) -> None:
    """See `Product`. All of as many rows."""
    for some in _at_once(products, SUMS):
        m = some[0].x.shape[0]
        block_f = OVER_ROWS["BLOCK_F"]
        sizes = [(p.x.shape[1], m) for p in some]
        _launch(over_rows_kernel, some, OVER_ROWS, "BLOCK_M", block_f, sizes, RANKS_OVER_ROWS)


def _at_once(products: Sequence[Product], count: int) -> Iterator[Sequence[Product]]:
    products = [product for product in products if product.out.numel()]
    for begin in range(0, len(products), count):
        yield products[begin : begin + count]


def _launch(
    kernel: Callable[..., Any],
    products: Sequence[Product],
    tiles: Config,
    unit_name: str,
    block: int,
    sizes: Sequence[tuple[int, int]],
    most_ranks: int,
) -> None:
    """Products whose tiles are of `block` of the first size, and whose sums are over the second, so many
    `unit_name` at a time. How they are cut does not depend on which others there are."""
    x = products[0].x
    unit = 32 if x.dtype == torch.float32 else 64
    ranks = [product.out.shape[1] for product in products]
    block_r = min(ranks_of(max(ranks)), most_ranks)
    jobs: list[Job] = []
    first, cut = 0, False
    for product, (size, depth), rank in zip(products, sizes, ranks, strict=True):
        alone = cdiv(size, block) * cdiv(rank, min(ranks_of(rank), most_ranks))
        features = product.x.shape[1]
        units, splits = split_sum(alone, depth, unit, x.device)
        programs = cdiv(size, block) * cdiv(rank, block_r) * splits
        counts = varying(first), varying(programs), varying(splits), varying(units)
        tensors, scale = (product.x, product.factor, product.out), product.scale * product.seen.scale
        (f, f_rank), (o, o_rank) = product.factor.stride(), product.out.stride()
        numbers = features, rank, f, f_rank, o, o_rank
        jobs.append(Job(*tensors, *numbers, scale, product.seen.args, *counts))
        first += programs
        cut = cut or splits > 1
    parts = parts_of(first, block * block_r, x.device) if cut else None
    # Of each, as the compiler lets masks have a say in the order of sums.
    quads = tuple(product.x.shape[1] % 4 == 0 for product in products)
    blocks = {"JOBS": len(jobs), "QUADS": quads, unit_name: unit, "BLOCK_R": block_r}
    launch(kernel, (first,), tuple(jobs), parts, x.shape[0], config=tiles, **blocks)


def sum_with_deltas(terms: Sequence[Tensor], deltas: Sequence[Delta]) -> Tensor:
    """The sum of `terms` [m, features], at least one, and `deltas`: in fp32, rounded once. In the memory of
    the first term."""
    first = terms[0]
    if len(terms) == 1 and not deltas:
        return first
    count = max(len(terms), len(deltas))
    total = None
    for begin in range(0, count, DELTAS):
        end = begin + DELTAS
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
    """out = total + terms + deltas, of activations of `dtype`."""
    m, features = out.shape
    in_fp32 = dtype == torch.float32
    tiles = EXPAND_FEW if m <= FEW_ROWS or in_fp32 else EXPAND  # else too many registers
    grid = (cdiv(m, tiles["BLOCK_M"]) * cdiv(features, tiles["BLOCK_F"]), 1)
    found: tuple[DeltaArgs, ...] = tuple(filter(None, map(delta_args, deltas)))
    seen = tuple(delta.seen.args for delta in deltas)
    args = total, tuple(terms) or None, found or None, seen or None, out, m, features
    block_r = summed_ranks_of(max((delta.v.shape[1] for delta in deltas), default=0), dtype)
    constants = {"DTYPE": type_of(dtype), "QUADS": features % 4 == 0}
    launch(expand_kernel, grid, *args, config=tiles, BLOCK_R=block_r, **constants)


def ranks_of(rank: int) -> int:
    return min(max(power_of_2(rank), 16), MAX_RANKS)


def summed_ranks_of(rank: int, dtype: torch.dtype) -> int:
    """How many of them `delta_tile` sums at a time: a longer chain of sums in fp32 would show."""
    return min(ranks_of(rank), 16) if dtype == torch.float32 else ranks_of(rank)
