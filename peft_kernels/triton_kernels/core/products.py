"""What products share: their precision, tiles of results, and sums that are cut into splits.

Splits leave parts in fp32. The program that is done last puts them together in a fixed order: the same bits
every time.
"""

from __future__ import annotations

import functools
import itertools
import secrets
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .launch import cdiv, on_amd, takes_ptx

MOST_SPLITS = tl.constexpr(128)
MOST_THREADS = tl.constexpr(512)
PROGRAMS_PER_PROCESSOR = 4
LEAST_DEPTH = 512  # of a split's sum


@triton.constexpr_function
def takes_wgmma() -> bool:
    """Inside kernels: whether products are Hopper's, of four warps that share an operand."""
    return takes_ptx() and cuda_capability_geq(9) and not cuda_capability_geq(10)


@triton.jit
def dot(a, b, result: tl.constexpr, acc=None):
    """acc + a b, summed in fp32. `result` is the type that the sums are rounded to in the end.

    How numbers are multiplied:

    - both of one 16-bit type: as they are. Their products are exact in fp32;
    - fp32 by fp32 or by 16 bits, for a result in fp32: as good as in fp32. Beside bfloat16 the fp32 number,
      `b`, is the sum of three of bfloat16. float16 would be rounded by that, but NVIDIA's tensor cores take
      tf32 numbers, in parts too; others multiply in fp32;
    - the same for a result of 16 bits: by sixteen bits of each fp32 number, the sum of two of bfloat16. The
      product of the two low parts is left out. That is far better than such a result shows.
    """
    if a.dtype == b.dtype and (a.dtype != tl.float32 or result == tl.float32):
        acc = tl.dot(a, b, acc, input_precision="ieee")
    elif result != tl.float32:
        if a.dtype != tl.bfloat16:
            a = a.to(tl.float32)
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a_high, b_low, acc)
        if a.dtype != tl.bfloat16:
            a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_high, acc)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, acc)))
    elif takes_ptx():
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
    return acc


@triton.jit
def add_part(acc, part):
    """acc + part, where part is a `dot`. Of a plain sum the compiler would make dot(.., acc): one long chain
    of additions, each of which is rounded, on tensor cores towards zero."""
    return tl.fma(part, 1.0, acc)


@triton.jit
def wait_for_stores(place):
    """Until all threads of the program have stored what they stored. `place` points to an integer in memory,
    which stays as it is."""
    if on_amd():  # a barrier does not wait for what other waves store: each of them does here
        each = tl.zeros((MOST_THREADS,), tl.int64)
        tl.atomic_or(place + each, each.to(place.dtype.element_ty), sem="release", scope="gpu")
    tl.debug_barrier()


@triton.jit
def see_stores(place):
    """What threads of the program have stored is there for its others from here on. `place` as above."""
    wait_for_stores(place)
    if on_amd():  # nor does it renew what a wave's cache holds
        each = tl.zeros((MOST_THREADS,), tl.int64)
        tl.atomic_or(place + each, each.to(place.dtype.element_ty), sem="acquire", scope="gpu")


@triton.jit
def sum_splits(acc, parts, first, split, splits):
    """The sum of `acc` of all `splits` of a tile, and whether it is this program that has it: the last one.
    The splits are programs from `first` on.

    `parts` is what `parts_of` gives. Each program leaves its part, raises its flag and then looks at all
    flags. So one sees all of them raised, at least; if several do, they store the same numbers. A raised flag
    holds the launch's own number, so that memory need not be cleared before. It is lowered afterwards, for a
    CUDA graph would launch the same again.
    """
    if parts is None:
        total = acc
        last = True
    else:
        SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
        at = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        at = parts.sums + tl.cast(first, tl.int64) * SIZE + at
        tl.store(at + split * SIZE, acc)
        flag = parts.flags + first + split
        wait_for_stores(flag)
        tl.atomic_xchg(flag, parts.number, sem="acq_rel", scope="gpu")
        lane = tl.arange(0, MOST_SPLITS)
        there = lane < splits
        flags = parts.flags + first + lane
        # Not loads: between two of these, on any flag of two, there is an order.
        seen = tl.atomic_or(flags, tl.zeros_like(lane).to(tl.int64), mask=there, sem="acq_rel", scope="gpu")
        last = tl.sum(tl.where(there & (seen != parts.number), 1, 0), axis=0) == 0
        total = tl.zeros_like(acc)
        for _ in range(0, tl.where(last, splits, 0)):
            total += tl.load(at)
            at += SIZE
        tl.store(flags, tl.zeros_like(lane).to(tl.int64), mask=there & last)
    return total, last


@triton.jit
def store_tile(out_ptr, values, token, m, feature, features, wanted):
    """values [features, tokens] to out [m, features], rounded once, if `wanted`."""
    at = out_ptr + token.to(tl.int64)[None, :] * features + feature[:, None]
    inside = (feature < features)[:, None] & (token < m)[None, :]
    tl.store(at, values.to(out_ptr.dtype.element_ty), mask=inside & wanted)


class Split(NamedTuple):
    """How a sum is cut."""

    units: int  # of a part
    splits: int


class Parts(NamedTuple):
    """Where the programs of a launch leave parts of sums, and tell that they did."""

    sums: Tensor  # fp32, a tile of each program
    flags: Tensor  # int64, one of each program
    number: int  # of the launch, never the same again


_numbers = itertools.count(secrets.randbits(58))


def parts_of(programs: int, tile: int, device: torch.device) -> Parts:
    """For a launch of `programs` whose tiles have `tile` elements, a multiple of 4."""
    memory = torch.empty(programs * (tile + 2), dtype=torch.float32, device=device)
    # Odd and long: compiled code is the same for all. The factor keeps them apart from numbers that happen.
    number = next(_numbers) * 0x9E3779B97F4A7C15 % (1 << 60) * 2 + 1 + (1 << 61)
    return Parts(memory, memory[programs * tile :].view(torch.int64), number)


def split_sum(programs: int, depth: int, unit: int, device: torch.device) -> Split:
    """Cut sums over `depth` so that all processors work.

    `programs` are what there are without it, and a part is a multiple of `unit`. The order of sums depends on
    shapes and the card's size alone.
    """
    splits = max(processors(device) * PROGRAMS_PER_PROCESSOR // max(programs, 1), 1)
    units = cdiv(cdiv(depth, min(splits, MOST_SPLITS.value)), unit)
    units = max(units, cdiv(min(LEAST_DEPTH, depth), unit), 1)
    return Split(units, max(cdiv(depth, units * unit), 1))


def type_of(dtype: torch.dtype) -> tl.dtype:
    """As kernels call it."""
    found: tl.dtype = getattr(tl, str(dtype).removeprefix("torch."))
    return found


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors, or compute units, of a card; where there is none, few."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
