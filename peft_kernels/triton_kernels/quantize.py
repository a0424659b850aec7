"""Weights to NF4 codes, and double quantisation of their absmax: bit-equal to reference/nf4.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..code_tables import NESTED_BLOCKSIZE, NF4_THRESHOLDS, dynamic_map, dynamic_thresholds
from .common import check_blocksize, check_dtype, check_float, check_nested
from .decode import load_absmax
from .launch import launch

ELEMENTS = 4096  # of a program: one block of the largest size
QUANTIZE_CONFIGS = [triton.Config({}, num_warps=8)]
GROUP_CONFIGS = [triton.Config({}, num_warps=4)]

THRESHOLDS = tl.constexpr(NF4_THRESHOLDS)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
ZERO_CODE = tl.constexpr(7)
GROUP = tl.constexpr(NESTED_BLOCKSIZE)


@triton.jit
def max_magnitude(x):
    """Of each row of fp32 numbers. By their bits, of which those of NaN come last: a NaN shows."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def usable_inverse(absmax):
    """1 / absmax; of a block all zero, or too small to invert, 0: its elements take the code of 0.0."""
    inverse = tl.div_rn(1.0, absmax)
    return tl.where(inverse > LARGEST, 0.0, inverse)


@triton.jit
def quantize_kernel(
    weight, packed, absmax, numel, nbytes, nblocks, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(weight + element, mask=element < numel, other=0.0).to(tl.float32)
    largest = max_magnitude(x)
    tl.store(absmax + block, largest, mask=block < nblocks)
    scaled = x * usable_inverse(largest)[:, None]
    code = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for i in tl.static_range(15):
        code += tl.where(scaled > THRESHOLDS[i], 1, 0)
    code = tl.where(element < numel, code, ZERO_CODE)
    high, low = tl.split(tl.reshape(code, (BLOCKS, HALF, 2)))
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed + byte, (high << 4 | low).to(tl.uint8), mask=byte < nbytes)


@triton.jit
def quantize_absmax_kernel(absmax, offset, midpoints, q8, absmax2, nblocks, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    block = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = block < nblocks
    x = tl.where(inside, tl.load(absmax + block, mask=inside, other=0.0) - tl.load(offset), 0.0)
    largest = max_magnitude(x)
    tl.store(absmax2 + group, largest, mask=group * GROUP < nblocks)
    scaled = x * usable_inverse(largest)[:, None]
    # How many midpoints are smaller: the nearest entry of the map, the lower one on a tie.
    code = tl.zeros((GROUPS, GROUP), tl.int32)
    for i in tl.static_range(8):
        code += tl.where(scaled > tl.load(midpoints + code + ((128 >> i) - 1)), 128 >> i, 0)
    tl.store(q8 + block, code.to(tl.uint8), mask=inside)


@triton.jit
def unpack_absmax_kernel(q8, absmax2, offset, dynamic_map, out, nblocks, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = block < nblocks
    tl.store(out + block, load_absmax(q8, absmax2, offset, dynamic_map, block, inside), mask=inside)


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_blocksize(blocksize)
    check_float(weight, "weight")
    weight = weight.contiguous()
    numel = weight.numel()
    nbytes, nblocks = (numel + 1) // 2, -(-numel // blocksize)
    packed = weight.new_empty(nbytes, dtype=torch.uint8)
    absmax = weight.new_empty(nblocks, dtype=torch.float32)
    launch(
        quantize_kernel,
        lambda meta: (triton.cdiv(numel, ELEMENTS),),
        weight,
        packed,
        absmax,
        numel,
        nbytes,
        nblocks,
        configs=QUANTIZE_CONFIGS,
        BLOCKSIZE=blocksize,
        BLOCKS=ELEMENTS // blocksize,
    )
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype(absmax, torch.float32, "absmax")
    absmax = absmax.contiguous()
    nblocks = absmax.numel()
    offset = absmax.mean()  # torch's, as in the reference: another order of its sums would be another format
    q8 = absmax.new_empty(nblocks, dtype=torch.uint8)
    absmax2 = absmax.new_empty(-(-nblocks // NESTED_BLOCKSIZE))
    launch(
        quantize_absmax_kernel,
        lambda meta: (triton.cdiv(absmax2.numel(), meta["GROUPS"]),),
        absmax,
        offset,
        dynamic_thresholds(absmax.device),
        q8,
        absmax2,
        nblocks,
        configs=GROUP_CONFIGS,
        GROUPS=4,
    )
    return q8, absmax2, offset


def unpack_absmax(q8: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    check_dtype(q8, torch.uint8, "q8")
    check_nested(absmax2, offset, q8.numel())
    q8, absmax2 = q8.contiguous(), absmax2.contiguous()
    out = absmax2.new_empty(q8.numel())
    launch(
        unpack_absmax_kernel,
        lambda meta: (triton.cdiv(out.numel(), meta["BLOCK"]),),
        q8,
        absmax2,
        offset,
        dynamic_map(q8.device),
        out,
        out.numel(),
        configs=GROUP_CONFIGS,
        BLOCK=1024,
        enable_fp_fusion=False,
    )
    return out
