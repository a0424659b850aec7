"""Dropout whose mask is a function of a seed, bit-equal to the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.lora.dropout import dropout_scale, dropout_threshold
from .common import check, check_dtype, check_float, check_numel
from .launch import VARYING, cdiv, config, launch, varying

DROPOUT = config(8, 3, BLOCK=2048)


class Mask(NamedTuple):
    """A dropout mask of activations; kept elements are multiplied by `scale`."""

    seed: Tensor
    stream: int
    p: float

    @property
    def threshold(self) -> int:
        return dropout_threshold(self.p)

    @property
    def scale(self) -> float:
        return dropout_scale(self.p)


class MaskArgs(NamedTuple):
    """`Mask` for kernels, inside tuples."""

    seed: Tensor | None
    stream: int  # varying
    threshold: int  # varying


def pack_mask(mask: Mask | None) -> MaskArgs:
    if mask is None:
        return MaskArgs(None, 0, 0)
    # Above 2^36, so that Triton types it int64 for every p.
    return MaskArgs(mask.seed, varying(mask.stream), varying(mask.threshold + (1 << 32)))


@triton.jit
def unpack_mask(mask):
    """The mask that `keep_mask` takes, from a MaskArgs."""
    return mask.seed, mask.stream >> 4, mask.threshold >> 4 & 0xFFFFFFFF


def mask_args(mask: Mask | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if mask is None else (mask.seed, mask.stream, mask.threshold)


@triton.jit
def philox_words(seed_ptr, stream, block, last=0):
    """The four words of Philox4x32-10 of each block, int64 of any shape. `last`: the counter's last word.

    Word i of block b decides element 4 b + i of the flattened activations.
    """
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(tl.load(seed_ptr), low, high, tl.cast(stream, tl.uint32), tl.cast(last, tl.uint32))


@triton.jit
def keep_mask(mask, token, first, features, WIDTH: tl.constexpr, QUADS: tl.constexpr):
    """Which elements of activations [.., features] dropout keeps: bool [rows, WIDTH], for the rows `token`
    (int64) and WIDTH features from `first`. `mask` as from `mask_args`. QUADS: features and first are
    multiples of 4."""
    seed_ptr, stream, threshold = mask
    element = token * features + first
    if QUADS:
        block = (element >> 2)[:, None] + tl.arange(0, WIDTH // 4)[None, :]
        w0, w1, w2, w3 = philox_words(seed_ptr, stream, block)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        each = element[:, None] + tl.arange(0, WIDTH)[None, :]
        w0, w1, w2, w3 = philox_words(seed_ptr, stream, each >> 2)
        at = each & 3
        words = tl.where(at < 2, tl.where(at == 0, w0, w1), tl.where(at == 2, w2, w3))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=VARYING)
def dropout_kernel(x_ptr, out_ptr, seed_ptr, threshold: tl.uint32, scale, numel, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    w0, w1, w2, w3 = philox_words(seed_ptr, 0, first // 4 + tl.arange(0, BLOCK // 4))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # A factor, not a selection of x: a dropped NaN stays NaN.
    factor = tl.where(words >= tl.cast(threshold, tl.uint32), scale, 0.0)
    element = first + tl.arange(0, BLOCK)
    inside = element < numel
    values = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=inside)


def dropout(args: Any) -> Tensor:
    x, p, seed = args
    check_float(x, "x")
    check_dropout(p, seed)
    if p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    x = x.contiguous()
    out = torch.empty_like(x)
    grid = (cdiv(x.numel(), DROPOUT["BLOCK"]),)
    tensors = x, out, seed, dropout_threshold(p), dropout_scale(p), x.numel()
    launch(dropout_kernel, grid, *tensors, config=DROPOUT)
    return out


def check_dropout(p: float, seed: Tensor | None) -> None:
    """Raises RuntimeError unless p and seed are valid; p = 0 needs no seed."""
    check(0.0 <= p <= 1.0, "dropout_p", "0 to 1", p)
    if p > 0:
        check(seed is not None, "seed", f"an int64 tensor of one element with dropout_p {p}", "none")
        assert seed is not None
        check_dtype(seed, torch.int64, "seed")
        check_numel(seed, 1, "seed")
