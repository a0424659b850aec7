"""dequantize_nf4 in all formats, bit for bit, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forms import FORMS, weight_of
from nf4_oracle import assert_same
from numbers_policy import each_dtype
from torch import Tensor

import testing
from peft_kernels.core.formats import CODE_VALUES, FORMATS, e4m3_values, e8m0_values

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")

CPU = torch.device("cpu")
BY_CODE = ("mxfp4", "nvfp4")
FP4 = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def layout_of(format: str) -> int:
    form = FORMATS[format]
    return form.layout(form.blocksizes[0] if format in BY_CODE else 64)


def scales_of(format: str) -> Tensor:
    """The values of the 256 codes; NVFP4's times a scale of the weight that is no power of two."""
    return e8m0_values(CPU) if format == "mxfp4" else e4m3_values(CPU) * 0.0137


def values_of(format: str) -> np.ndarray:
    magnitudes = FP4 if format == "fp4" else E2M1
    negative = [-m if m or format != "fp4" else 0.0 for m in map(float, magnitudes)]
    return np.array([*magnitudes, *negative], np.float32)


def oracle(packed: Tensor, scales: Tensor, format: str, blocksize: int, dtype: torch.dtype) -> Tensor:
    data, table = packed.numpy().ravel(), values_of(format)
    values = np.stack((table[data >> 4], table[data & 15]), 1).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        values = values * np.repeat(scales.numpy(), blocksize)[: values.size]
    return torch.from_numpy(values).to(dtype)


def test_values_of_codes(backend: str) -> None:
    for format in ("fp4", *BY_CODE):
        assert_same(
            torch.tensor(CODE_VALUES[FORMATS[format].codes]), torch.from_numpy(values_of(format)), format
        )


@each_dtype
@pytest.mark.parametrize("format", BY_CODE)
def test_every_code_with_every_scale(backend: str, format: str, dtype: torch.dtype) -> None:
    """Every code in both nibbles, with every scale code, also those that stand for NaN."""
    layout, blocksize = layout_of(format), FORMATS[format].blocksizes[0]
    codes = (torch.arange(256)[:, None, None] + torch.arange(blocksize) + torch.arange(2)[:, None]) % 16
    packed = (codes[..., 0::2] << 4 | codes[..., 1::2]).to(torch.uint8).reshape(-1)  # (scale, shift, byte)
    absmax, values = torch.arange(256, dtype=torch.uint8).repeat_interleave(2), scales_of(format)
    shape = [512, blocksize]
    got = ops.dequantize_nf4(packed, absmax, values, None, layout, shape, dtype)
    want = oracle(packed, values.repeat_interleave(2), format, blocksize, dtype)
    assert_same(got.view(-1), want, format)


@each_dtype
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_fp4_with_every_byte(backend: str, blocksize: int, dtype: torch.dtype) -> None:
    packed = torch.arange(256).to(torch.uint8).repeat(200)
    absmax = testing.tensor(packed.numel() * 2 // blocksize).abs()
    layout = FORMATS["fp4"].layout(blocksize)
    got = ops.dequantize_nf4(packed, absmax, None, None, layout, [packed.numel() * 2], dtype)
    assert_same(got, oracle(packed, absmax, "fp4", blocksize, dtype), "values")


@each_dtype
def test_nested_fp4(backend: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256).to(torch.uint8).repeat(100)
    q8, absmax2, offset = ops.quantize_absmax(testing.tensor(800).abs())
    absmax = ops.unpack_absmax(q8, absmax2, offset)
    layout = FORMATS["fp4"].layout(64)
    got = ops.dequantize_nf4(packed, q8, absmax2, offset, layout, [51200], dtype)
    assert_same(got, oracle(packed, absmax, "fp4", 64, dtype), "values")


@each_dtype
@pytest.mark.parametrize("format", ["fp4", *BY_CODE])
def test_any_size(backend: str, format: str, dtype: torch.dtype) -> None:
    blocksize = 32 if format == "fp4" else FORMATS[format].blocksizes[0]
    layout = FORMATS[format].layout(blocksize)
    for numel in (0, 1, 2, 15, 16, 17, 31, 33, 47, 48, 64, 101, 257, 1000):
        packed = torch.arange((numel + 1) // 2).mul(61).add(numel).to(torch.uint8)
        count = -(-numel // blocksize)
        if format == "fp4":
            scales = testing.tensor(count).abs()
            group: tuple[Tensor, Tensor | None] = (scales, None)
        else:
            codes = torch.arange(count).mul(37).add(90).remainder(120).to(torch.uint8)
            scales, group = scales_of(format)[codes.long()], (codes, scales_of(format))
        got = ops.dequantize_nf4(packed, *group, None, layout, [numel], dtype)
        assert_same(got, oracle(packed, scales, format, blocksize, dtype)[:numel], f"numel {numel}")


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_views(backend: str, form: str, dtype: torch.dtype) -> None:
    """Bytes and scales at odd addresses, and with steps."""
    weight = weight_of(form, 6, 384)
    packed, absmax, *rest = weight._state.op_args
    want = ops.dequantize_nf4(packed, absmax, *rest, [6, 384], dtype)
    shifted = torch.cat((packed.new_zeros(3), packed.flatten()))[3:]
    scales = torch.cat((absmax.new_zeros(1), absmax))[1:]
    assert_same(ops.dequantize_nf4(shifted, scales, *rest, [6, 384], dtype), want, "odd addresses")
    wide, wide_scales = packed.flatten().repeat_interleave(2), absmax.repeat_interleave(3)
    got = ops.dequantize_nf4(wide[::2], wide_scales[::3], *rest, [6, 384], dtype)
    assert_same(got, want, "steps")
