"""Quantisation to NF4 (Dettmers et al. 2023), double quantisation of its scales, and dequantisation."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.code_tables import (
    NESTED_BLOCKSIZE,
    ZERO_POINT,
    dynamic_map,
    dynamic_thresholds,
    nf4_thresholds,
)
from ..core.formats import Format, blocksize_of, byte_format, code_values
from ..core.op import Base, Op

ZERO_CODE = 7
"""Code of 0.0, also used for blocks without a usable scale and to pad an odd tail."""


class QuantizeNF4(Op):
    name = "quantize_nf4"
    schema = "(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)"

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        flat = args.weight.reshape(-1).float()
        blocks = _blocks(flat, args.blocksize)
        absmax = blocks.abs().amax(1)
        scaled = blocks * _reciprocal(absmax)[:, None]
        codes = _code_of(scaled, nf4_thresholds(flat.device)).view(-1)[: flat.numel()]
        codes = F.pad(codes, (0, codes.numel() % 2), value=ZERO_CODE)
        return codes[0::2] << 4 | codes[1::2], absmax

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        weight, n = args.weight, args.weight.numel()
        packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
        return packed, weight.new_empty((n + args.blocksize - 1) // args.blocksize, dtype=torch.float32)


class QuantizeAbsmax(Op):
    name = "quantize_absmax"
    schema = "(Tensor absmax) -> (Tensor q8, Tensor absmax2, Tensor offset)"

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        absmax = args.absmax.contiguous()  # the order in which torch adds depends on the strides
        offset = absmax.mean()
        blocks = _blocks(absmax - offset, NESTED_BLOCKSIZE)
        absmax2 = blocks.abs().amax(1)
        q8 = _code_of(blocks * _reciprocal(absmax2)[:, None], dynamic_thresholds(absmax.device))
        return q8.view(-1)[: absmax.numel()].contiguous(), absmax2, offset

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor]:
        absmax, n = args.absmax, args.absmax.numel()
        absmax2 = absmax.new_empty((n + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE)
        return absmax.new_empty(n, dtype=torch.uint8), absmax2, absmax.new_empty(())


class UnpackAbsmax(Op):
    name = "unpack_absmax"
    schema = "(Tensor q8, Tensor absmax2, Tensor offset) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        return _unpack_absmax(args.q8, args.absmax2, args.offset)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.absmax2.new_empty(args.q8.numel())


class DequantizeNF4(Op):
    name = "dequantize_nf4"
    schema = "($nf4, SymInt[] shape, ScalarType dtype) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        return dense_weight(args.base, args.shape, args.dtype)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.base.weight.new_empty(args.shape, dtype=args.dtype)


def dense_weight(base: Base, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A base weight as a dense matrix (out, in); a packed one is dequantised to `dtype`."""
    absmax = base.absmax
    if absmax is None:
        return base.weight
    if (form := byte_format(base.layout)) is not None:
        return _from_bytes(base.weight, absmax, form, blocksize_of(base.layout), shape).to(dtype)
    zeros = None
    if base.absmax2 is None:
        zeros = base.offset
    elif base.offset is not None:
        absmax = _unpack_absmax(absmax, base.absmax2, base.offset)
    else:
        absmax = base.absmax2[absmax.reshape(-1).long()]
    flat, numel = base.weight.reshape(-1), prod(shape)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).view(-1)[:numel]

    def each(of_blocks: Tensor) -> Tensor:
        return of_blocks.reshape(-1).float().repeat_interleave(blocksize_of(base.layout))[:numel]

    values = code_values(base.layout, flat.device)[codes.long()]
    if zeros is not None:
        values = values - (each(zeros) - ZERO_POINT)
    return (values * each(absmax)).to(dtype).reshape(tuple(shape))


def _from_bytes(codes: Tensor, absmax: Tensor, form: Format, blocksize: int, shape: Sequence[int]) -> Tensor:
    assert form.code_dtype is not None
    rows, cols = prod(shape[:-1]), shape[-1]
    height, width = form.cell(cols, blocksize)
    values = codes.reshape(rows, cols).view(form.code_dtype).float()
    by_block = absmax.view(-(-rows // height), form.scales((1, cols), blocksize))
    scale = by_block.repeat_interleave(height, 0)[:rows].repeat_interleave(max(width, 1), 1)[:, :cols]
    return (values * scale).reshape(tuple(shape))


def _unpack_absmax(q8: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    scale = absmax2.repeat_interleave(NESTED_BLOCKSIZE)[: q8.numel()]
    return dynamic_map(q8.device)[q8.reshape(-1).long()] * scale + offset


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    """Zero-pad a flat tensor and view it as (nblocks, blocksize)."""
    nblocks = -(-flat.numel() // blocksize)
    return F.pad(flat, (0, nblocks * blocksize - flat.numel())).view(nblocks, blocksize)


def _reciprocal(absmax: Tensor) -> Tensor:
    # 1 / absmax overflows for all-zero blocks and the smallest subnormals; 0 gives both the code of zero.
    inverse = 1.0 / absmax
    return torch.where(inverse.isinf(), torch.zeros_like(inverse), inverse)


def _code_of(x: Tensor, thresholds: Tensor) -> Tensor:
    # bucketize counts the thresholds below x, except that it sorts NaN last where `x > t` is never true.
    return torch.where(x.isnan(), 0, torch.bucketize(x, thresholds)).to(torch.uint8)
