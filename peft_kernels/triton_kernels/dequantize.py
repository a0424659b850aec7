"""NF4 weights back to floats, absmax unpacked on the way: bit-equal to reference/nf4.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import nf4
from .decode import decode, load_absmax
from .launch import launch

ELEMENTS = 4096  # of a program: one block of the largest size
CONFIGS = [triton.Config({}, num_warps=4)]


@triton.jit
def dequantize_kernel(
    packed,
    absmax,
    absmax2,
    offset,
    dynamic_map,
    out,
    numel,
    nbytes,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PTX: tl.constexpr,
):
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    numbers = decode(tl.load(packed + byte, mask=byte < nbytes, other=0), tl.float32, PTX)
    scale = load_absmax(absmax, absmax2, offset, dynamic_map, block, block * BLOCKSIZE < numel)[:, None]
    values = (numbers * scale).to(out.dtype.element_ty)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out + element, values, mask=element < numel)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(tuple(shape), dtype=dtype)
    numel = out.numel()
    weight = nf4(packed, absmax, absmax2, offset, blocksize, numel)
    launch(
        dequantize_kernel,
        lambda meta: (triton.cdiv(numel, ELEMENTS),),
        *weight[:5],
        out,
        numel,
        weight.packed.numel(),
        configs=CONFIGS,
        BLOCKSIZE=blocksize,
        BLOCKS=ELEMENTS // blocksize,
        enable_fp_fusion=False,
    )
    return out
