"""Dropout whose mask is a function of a seed: bit-equal to reference/dropout.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.dropout import dropout_scale, dropout_threshold
from .common import check, check_dtype, check_float, check_numel
from .launch import launch

CONFIGS = [triton.Config({"BLOCK": 2048}, num_warps=8)]


@triton.jit
def words_of(seed, stream, block):
    """The four words of Philox4x32-10 of each block, int64 of any shape. `seed` points to int64.

    Word i of block b decides on element 4 b + i of the flattened activations.
    """
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(tl.load(seed), low, high, tl.cast(stream, tl.uint32), 0)


@triton.jit
def dropout_kernel(x, out, seed, threshold: tl.uint32, scale, numel, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    w0, w1, w2, w3 = words_of(seed, 0, first // 4 + tl.arange(0, BLOCK // 4))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # Not a selection of x: NaN stays where its element is dropped.
    factor = tl.where(words >= tl.cast(threshold, tl.uint32), scale, 0.0)
    element = first + tl.arange(0, BLOCK)
    inside = element < numel
    values = tl.load(x + element, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + element, values.to(out.dtype.element_ty), mask=inside)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    check_float(x, "x")
    check_dropout(p, seed)
    if p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    x = x.contiguous()
    out = torch.empty_like(x)
    launch(
        dropout_kernel,
        lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),),
        x,
        out,
        seed,
        dropout_threshold(p),
        dropout_scale(p),
        x.numel(),
        configs=CONFIGS,
    )
    return out


def check_dropout(p: float, seed: Tensor | None) -> None:
    """Probability and seed of dropout. RuntimeError when they are none; p = 0 needs no seed."""
    check(0.0 <= p <= 1.0, "dropout_p", "0 to 1", p)
    if p > 0:
        check(seed is not None, "seed", f"an int64 tensor of one element with dropout_p {p}", "none")
        assert seed is not None
        check_dtype(seed, torch.int64, "seed")
        check_numel(seed, 1, "seed")
