"""Quantising to NF4 and back, and products with a frozen NF4 weight."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..code_tables import NESTED_BLOCKSIZE, dynamic_map, dynamic_thresholds, nf4_code, nf4_thresholds

ZERO_CODE = 7
"""Code of 0.0: what blocks without a usable scale, and the padding of an odd tail, are written as."""


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    """Zero-pad a flat tensor and view it as (nblocks, blocksize)."""
    nblocks = -(-flat.numel() // blocksize)
    return F.pad(flat, (0, nblocks * blocksize - flat.numel())).view(nblocks, blocksize)


def _reciprocal(absmax: Tensor) -> Tensor:
    # 1/absmax overflows for an all-zero block and for the deepest subnormals; 0 sends both to the code of
    # zero.
    inverse = 1.0 / absmax
    return torch.where(inverse.isinf(), torch.zeros_like(inverse), inverse)


def _code_of(x: Tensor, thresholds: Tensor) -> Tensor:
    # bucketize counts the thresholds below x, except that it sorts NaN last where `x > t` is never true.
    return torch.where(x.isnan(), 0, torch.bucketize(x, thresholds)).to(torch.uint8)


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1).float()
    blocks = _blocks(flat, blocksize)
    absmax = blocks.abs().amax(1)
    codes = _code_of(blocks * _reciprocal(absmax)[:, None], nf4_thresholds(weight.device)).view(-1)[
        : flat.numel()
    ]
    codes = F.pad(codes, (0, codes.numel() % 2), value=ZERO_CODE)
    return codes[0::2] << 4 | codes[1::2], absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    blocks = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    absmax2 = blocks.abs().amax(1)
    q8 = _code_of(blocks * _reciprocal(absmax2)[:, None], dynamic_thresholds(absmax.device))
    return q8.view(-1)[: absmax.numel()].contiguous(), absmax2, offset


def unpack_absmax(q8: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    scale = absmax2.repeat_interleave(NESTED_BLOCKSIZE)[: q8.numel()]
    return dynamic_map(q8.device)[q8.reshape(-1).long()] * scale + offset


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    if absmax2 is not None:
        assert offset is not None
        absmax = unpack_absmax(absmax, absmax2, offset)
    flat = packed.reshape(-1)
    numel = prod(shape)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).view(-1)[:numel]
    scale = absmax.repeat_interleave(blocksize)[:numel]
    return (nf4_code(packed.device)[codes.long()] * scale).to(dtype).reshape(tuple(shape))


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    weight = dequantize_nf4(packed, absmax, absmax2, offset, blocksize, (out_features, x.shape[-1]), x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def nf4_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    in_features: int,
) -> Tensor:
    weight = dequantize_nf4(packed, absmax, absmax2, offset, blocksize, (dy.shape[-1], in_features), dy.dtype)
    return dy @ weight
