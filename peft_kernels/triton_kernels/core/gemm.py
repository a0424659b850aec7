"""What GEMM kernels share: the precision of `dot`, stores of result tiles, and split-K.

Splits leave fp32 partial sums. The program that finishes last adds them in a fixed order, so results are
reproducible.
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

from .launch import cdiv, targets_amd, targets_ptx

MAX_SPLITS = tl.constexpr(128)
MAX_THREADS = tl.constexpr(512)
PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_DEPTH = 512  # elements that a split sums


@triton.constexpr_function
def uses_wgmma() -> bool:
    """Inside kernels: whether `tl.dot` compiles to Hopper's wgmma, in which four warps share an operand."""
    return targets_ptx() and cuda_capability_geq(9) and not cuda_capability_geq(10)


@triton.jit
def dot(a, b, result: tl.constexpr, acc=None):
    """acc + a b, accumulated in fp32. `result` is the dtype that the sums are rounded to in the end.

    - Both operands of one 16-bit dtype: multiplied directly, products are exact in fp32.
    - fp32 times fp32 or 16 bits, for an fp32 result: as accurate as fp32. With bf16, the fp32 operand `b` is
      split into three bf16 values. float16 would be rounded by that, so it uses 3xTF32 on NVIDIA's tensor
      cores, and fp32 elsewhere.
    - The same for a 16-bit result: each fp32 value is split into two bf16 values, 16 bits in all; low times
      low is dropped. That is far more accurate than the result shows.
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
    elif targets_ptx():
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
    return acc


@triton.jit
def add_dot(acc, part):
    """acc + part, where part is a `dot`. The compiler would turn a plain sum into dot(.., acc): one long
    chain of additions, each rounded, on tensor cores towards zero."""
    return tl.fma(part, 1.0, acc)


@triton.jit
def wait_for_stores(place):
    """Wait until the stores of all threads of the program are done. `place` points to an integer in memory,
    which stays unchanged."""
    if targets_amd():  # a barrier does not wait for the stores of other waves, so each wave waits here
        each = tl.zeros((MAX_THREADS,), tl.int64)
        tl.atomic_or(place + each, each.to(place.dtype.element_ty), sem="release", scope="gpu")
    tl.debug_barrier()


@triton.jit
def sync_stores(place):
    """Make the stores of all threads of the program visible to all of them. `place` as above."""
    wait_for_stores(place)
    if targets_amd():  # nor does a barrier invalidate a wave's cache
        each = tl.zeros((MAX_THREADS,), tl.int64)
        tl.atomic_or(place + each, each.to(place.dtype.element_ty), sem="acquire", scope="gpu")


@triton.jit
def reduce_splits(acc, parts, first, split, splits):
    """The sum of `acc` over all `splits` of a tile, and whether this program holds it: the last to finish.
    The splits are programs `first`, `first + 1`, ...

    `parts` comes from `new_partials`. Each program stores its partial sum, raises its flag and then reads all
    flags. So at least one program sees all of them raised; if several do, they store the same values. A
    raised flag holds the launch's own number, so the memory need not be cleared first. Flags are lowered
    afterwards, because a CUDA graph launches with the same number again.
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
        lane = tl.arange(0, MAX_SPLITS)
        there = lane < splits
        flags = parts.flags + first + lane
        # Not loads: atomics on the same flag are ordered.
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
    """Store values [features, tokens] to out [m, features], rounded once, if `wanted`."""
    at = out_ptr + token.to(tl.int64)[None, :] * features + feature[:, None]
    inside = (feature < features)[:, None] & (token < m)[None, :]
    tl.store(at, values.to(out_ptr.dtype.element_ty), mask=inside & wanted)


class SplitK(NamedTuple):
    """How a sum is split."""

    units: int  # per split
    splits: int


class Partials(NamedTuple):
    """Scratch memory in which the programs of a launch exchange partial sums."""

    sums: Tensor  # fp32, a tile per program
    flags: Tensor  # int64, one per program
    number: int  # of the launch, unique


_numbers = itertools.count(secrets.randbits(58))


def new_partials(programs: int, tile: int, device: torch.device) -> Partials:
    """Allocates `Partials` for `programs` programs whose tiles have `tile` elements, a multiple of 4."""
    memory = torch.empty(programs * (tile + 2), dtype=torch.float32, device=device)
    # Odd and long, so one compilation serves all numbers. The factor makes a match by chance unlikely.
    number = next(_numbers) * 0x9E3779B97F4A7C15 % (1 << 60) * 2 + 1 + (1 << 61)
    return Partials(memory, memory[programs * tile :].view(torch.int64), number)


def split_k(programs: int, depth: int, unit: int, device: torch.device) -> SplitK:
    """Splits sums over `depth` so that all multiprocessors have work.

    `programs`: how many there are without splits. A split is a multiple of `unit`. The order of summation
    depends only on shapes and the card's size.
    """
    splits = max(multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR // max(programs, 1), 1)
    units = cdiv(cdiv(depth, min(splits, MAX_SPLITS.value)), unit)
    units = max(units, cdiv(min(MIN_DEPTH, depth), unit), 1)
    return SplitK(units, max(cdiv(depth, units * unit), 1))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of a torch dtype."""
    found: tl.dtype = getattr(tl, str(dtype).removeprefix("torch."))
    return found


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors (compute units) of a card; 2 on other devices."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
