"""Dequantisation of packed weights, and NF4's quantisation, bit-equal to the reference."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.code_tables import (
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    NF4_THRESHOLDS,
    dynamic_map,
    dynamic_thresholds,
)
from ..core.common import check, check_dtype, check_float
from ..core.launch import cdiv, config, launch
from .nf4_decode import block_shift, decode, load_absmax
from .nf4_groups import dequantize_groups
from .nf4_weight import Pointers, check_nested, nf4

ELEMENTS = 4096  # per program: one block of the largest size
QUANTIZE = config(8, 3)
DEQUANTIZE = config(4, 3)
ABSMAX = config(4, 3)

THRESHOLDS = tl.constexpr(NF4_THRESHOLDS)

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
ZERO_CODE = tl.constexpr(7)
GROUP = tl.constexpr(NESTED_BLOCKSIZE)


@triton.jit
def max_magnitude(x):
    """max |x| of each row of fp32 values. Compares bits, in which NaN is the largest, so NaN propagates."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def safe_reciprocal(absmax):
    """1 / absmax, or 0 where that overflows (all-zero blocks): its elements take the code of 0.0."""
    inverse = tl.div_rn(1.0, absmax)
    return tl.where(inverse > LARGEST, 0.0, inverse)


@triton.jit
def quantize_kernel(
    weight_ptr, packed_ptr, absmax_ptr, numel, nbytes, nblocks, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(weight_ptr + element, mask=element < numel, other=0.0).to(tl.float32)
    largest = max_magnitude(x)
    tl.store(absmax_ptr + block, largest, mask=block < nblocks)
    scaled = x * safe_reciprocal(largest)[:, None]
    code = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for i in tl.static_range(15):
        code += tl.where(scaled > THRESHOLDS[i], 1, 0)
    code = tl.where(element < numel, code, ZERO_CODE)
    high, low = tl.split(tl.reshape(code, (BLOCKS, HALF, 2)))
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + byte, (high << 4 | low).to(tl.uint8), mask=byte < nbytes)


@triton.jit
def dequantize_kernel(weight, out_ptr, numel, nbytes, LAYOUT: tl.constexpr, BLOCKS: tl.constexpr):
    BLOCKSIZE: tl.constexpr = 1 << block_shift(LAYOUT)
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    decoded = decode(tl.load(weight.packed + byte, mask=byte < nbytes, other=0), tl.float32, LAYOUT)
    scale = load_absmax(weight, block, block * BLOCKSIZE < numel)[:, None]
    values = (decoded * scale).to(out_ptr.dtype.element_ty)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + element, values, mask=element < numel)


@triton.jit
def quantize_absmax_kernel(
    absmax_ptr, offset_ptr, midpoints_ptr, q8_ptr, absmax2_ptr, nblocks, GROUPS: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    block = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = block < nblocks
    x = tl.where(inside, tl.load(absmax_ptr + block, mask=inside, other=0.0) - tl.load(offset_ptr), 0.0)
    largest = max_magnitude(x)
    tl.store(absmax2_ptr + group, largest, mask=group * GROUP < nblocks)
    scaled = x * safe_reciprocal(largest)[:, None]
    # The number of midpoints below x is the code of the nearest value, the lower one on a tie.
    code = tl.zeros((GROUPS, GROUP), tl.int32)
    for i in tl.static_range(8):
        code += tl.where(scaled > tl.load(midpoints_ptr + code + ((128 >> i) - 1)), 128 >> i, 0)
    tl.store(q8_ptr + block, code.to(tl.uint8), mask=inside)


@triton.jit
def unpack_absmax_kernel(weight, out_ptr, nblocks, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = block < nblocks
    tl.store(out_ptr + block, load_absmax(weight, block, inside), mask=inside)


def quantize_nf4(args: Any) -> tuple[Tensor, Tensor]:
    weight, blocksize = args
    sizes = f"a power of two from {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}"
    check(blocksize in BLOCKSIZES, "blocksize", sizes, blocksize)
    check_float(weight, "weight")
    weight = weight.contiguous()
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(cdiv(numel, blocksize), dtype=torch.float32)
    tensors = weight, packed, absmax, numel, packed.numel(), absmax.numel()
    blocks = {"BLOCKSIZE": blocksize, "BLOCKS": ELEMENTS // blocksize}
    launch(quantize_kernel, (cdiv(numel, ELEMENTS),), *tensors, config=QUANTIZE, **blocks)
    return packed, absmax


def dequantize_nf4(args: Any) -> Tensor:
    packed = args.base.weight
    out = packed.new_empty(tuple(args.shape), dtype=args.dtype)
    rows, cols = prod(out.shape[:-1]), out.shape[-1] if out.dim() else 1
    weight = nf4(args.base, rows, cols)
    if not weight.is_fused:
        dequantize_groups(weight, cols, range(rows), range(cols), out.view(1, rows, cols))
        return out
    grid = (cdiv(out.numel(), ELEMENTS),)
    tensors = weight.pointers, out, out.numel(), packed.numel()
    blocks = {"LAYOUT": weight.layout, "BLOCKS": ELEMENTS // weight.blocksize}
    launch(dequantize_kernel, grid, *tensors, config=DEQUANTIZE, **blocks, enable_fp_fusion=False)
    return out


def quantize_absmax(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype(args.absmax, torch.float32, "absmax")
    absmax = args.absmax.contiguous()
    nblocks, groups = absmax.numel(), 4
    # torch's mean, as in the reference: another order of summation would change the format.
    offset = absmax.mean()
    q8 = absmax.new_empty(nblocks, dtype=torch.uint8)
    absmax2 = absmax.new_empty(cdiv(nblocks, NESTED_BLOCKSIZE))
    grid = (cdiv(absmax2.numel(), groups),)
    tensors = absmax, offset, dynamic_thresholds(absmax.device), q8, absmax2, nblocks
    launch(quantize_absmax_kernel, grid, *tensors, config=ABSMAX, GROUPS=groups)
    return q8, absmax2, offset


def unpack_absmax(args: Any) -> Tensor:
    q8, absmax2, offset = args
    check_dtype(q8, torch.uint8, "q8")
    check_nested(absmax2, offset, q8.numel())
    out = absmax2.new_empty(q8.numel())
    weight = Pointers(None, q8.contiguous(), absmax2.contiguous(), offset, dynamic_map(q8.device))
    grid = (cdiv(out.numel(), 1024),)
    launch(
        unpack_absmax_kernel,
        grid,
        weight,
        out,
        out.numel(),
        config=ABSMAX,
        BLOCK=1024,
        enable_fp_fusion=False,
    )
    return out
