"""Quantises weights to the formats of `core.formats`.

NF4 has a kernel. The others are a few passes of torch, on any device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.code_tables import ZERO_POINT
from ..core.formats import FORMATS, Format, e4m3_values, e8m0_values
from ..core.registry import public_ops as ops

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""packed, absmax, absmax2 and offset of an `PackedState`."""

_E2M1_LARGEST = 6.0
_E4M3_LARGEST = FORMATS["fp8"].largest


def quantize(
    weight: Tensor, format: str, blocksize: int, double_quant: bool, checked: str | None = None
) -> Parts:
    """Packs a weight. With a name in `checked`, raises ValueError for values that are not finite."""
    scale = FORMATS[format].scale
    if scale == "absmax":
        packed, absmax = _by_absmax(weight, format, blocksize)
        _check_finite(absmax, weight, checked)
        return packed, *(ops.quantize_absmax(absmax) if double_quant else (absmax, None, None))
    if scale in ("half", "fp32"):
        _check_finite(weight.abs().amax()[None] if weight.numel() else weight, weight, checked)
        if scale == "half":
            return _int4(weight, blocksize, double_quant)
        return _bytes(weight, FORMATS[format], blocksize)
    blocks = weight.reshape(-1, blocksize).float()
    largest = blocks.abs().amax(1)
    _check_finite(largest, weight, checked)
    codes, values = (_e8m0_scales if scale == "e8m0" else _e4m3_scales)(largest)
    inverse = _reciprocal(values[codes.long()])
    return _pack(_codes_of(blocks * inverse[:, None], format)), codes, values, None


def _by_absmax(weight: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    if format == "nf4":
        packed, absmax = ops.quantize_nf4(weight, blocksize)
        return packed, absmax
    flat = weight.reshape(-1).float()
    count = -(-flat.numel() // blocksize)
    blocks = F.pad(flat, (0, count * blocksize - flat.numel())).view(count, blocksize)
    absmax = blocks.abs().amax(1)
    codes = _codes_of(blocks * _reciprocal(absmax)[:, None], format).view(-1)[: flat.numel()]
    return _pack(F.pad(codes, (0, codes.numel() % 2))), absmax


def _check_finite(largest: Tensor, weight: Tensor, name: str | None) -> None:
    """`largest`: the largest magnitude of each block, which is not finite if a value is not."""
    if name is None or bool(largest.sum().isfinite()) or bool(largest.isfinite().all()):
        return
    bad = int((~torch.isfinite(weight)).sum())
    raise ValueError(f"{name}: expected finite values, got {bad} NaN or Inf among {weight.numel()}")


def _e8m0_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest power of two with which no element overflows, as `triton_kernels` chooses it."""
    bits = (largest / _E2M1_LARGEST).view(torch.int32)
    return (bits + 0x7FFFFF >> 23).to(torch.uint8), e8m0_values(largest.device)


def _e4m3_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of blocks in E4M3 beside one for the whole weight, with which the largest block has the largest
    scale."""
    whole = largest.amax() / (_E2M1_LARGEST * _E4M3_LARGEST)
    found = (largest / _E2M1_LARGEST * _reciprocal(whole)).clamp(max=_E4M3_LARGEST)
    return found.to(torch.float8_e4m3fn).view(torch.uint8), e4m3_values(largest.device) * whole


def _int4(weight: Tensor, blocksize: int, with_zero_points: bool) -> Parts:
    """Codes from the smallest to the largest value of a block, both widened to include 0; without zero points
    as far to either side."""
    dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    blocks = weight.reshape(-1, blocksize).float()
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    wide = (high - low) / 15 if with_zero_points else torch.maximum(high / 7, -low / 8)
    scales = wide.clamp(max=torch.finfo(dtype).max).to(dtype)
    inverse = _reciprocal(scales.float())
    zeros = (-low * inverse).round().clamp(0, 15) if with_zero_points else torch.full_like(low, ZERO_POINT)
    codes = ((blocks * inverse[:, None]).round() + zeros[:, None]).clamp(0, 15).to(torch.uint8)
    return _pack(codes), scales, None, zeros.to(torch.uint8) if with_zero_points else None


def _bytes(weight: Tensor, form: Format, blocksize: int) -> Parts:
    """The largest magnitude of a block, or of a row, takes the largest code."""
    assert form.code_dtype is not None
    is_integer = not form.code_dtype.is_floating_point
    largest = form.largest - is_integer  # of int8 127, with either sign
    (rows, cols), x = weight.shape, weight.float()
    height, width = form.cell(max(cols, 1), blocksize)
    right = -cols % width if cols or blocksize else 1  # rows without columns have a scale too
    padded = F.pad(x, (0, right, 0, -rows % height))
    blocks = padded.view(-(-rows // height), height, padded.shape[1] // width, width)
    absmax = blocks.abs().amax((1, 3)) / largest
    scales = absmax.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :cols]
    scaled = (x * _reciprocal(scales)).clamp(-largest, largest)
    codes = (scaled.round() if is_integer else scaled).to(form.code_dtype)
    return codes.contiguous().view(torch.uint8), absmax.reshape(-1), None, None


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, or 0 where that overflows: blocks of zeros."""
    inverse = 1.0 / x
    return torch.where(inverse.isfinite(), inverse, 0.0)


_MAGNITUDES = {
    # bitsandbytes' decision thresholds, and its codes in the order of their magnitudes.
    "fp4": (
        (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333),
        (0, 1, 6, 7, 4, 5, 2, 3),
    ),
    "e2m1": ((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (0, 1, 2, 3, 4, 5, 6, 7)),
}


@lru_cache(maxsize=16)
def _magnitudes(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds, fp32 (7,), and codes, uint8 (8,): the code of x is the n-th if |x| exceeds n thresholds."""
    limits, codes = _MAGNITUDES[kind]
    thresholds = torch.tensor(limits, dtype=torch.float32)
    if kind == "e2m1":  # ties go to the even code
        below = torch.nextafter(thresholds[1::2], torch.tensor(0.0))
        thresholds[1::2] = below
    return thresholds.to(device), torch.tensor(codes, dtype=torch.uint8, device=device)


def _codes_of(x: Tensor, format: str) -> Tensor:
    thresholds, codes = _magnitudes("fp4" if format == "fp4" else "e2m1", x.device)
    found = codes[torch.bucketize(x.abs(), thresholds)]
    return found | torch.signbit(x).to(torch.uint8) << 3


def _pack(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1)
    return flat[0::2] << 4 | flat[1::2]
