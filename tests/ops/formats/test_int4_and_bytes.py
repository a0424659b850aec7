"""dequantize_nf4 of int4, FP8 and int8, bit for bit, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nf4_oracle import assert_same
from numbers_policy import each_dtype
from torch import Tensor

import testing
from peft_kernels.core.formats import FORMATS

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")

SCALE_BITS = (0, 1, 5, 0x03FF, 0x0400, 0x0401, 0x3C00, 0x3555, 0x7BFF, 0x8001, 0x83FF, 0xB555)
"""Of fp16: subnormals, the smallest and the largest normal number, negative ones. As bf16 normal numbers."""

each_scale = pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def int4_oracle(packed: Tensor, scales: Tensor, zeros: Tensor | None, blocksize: int) -> Tensor:
    data = packed.numpy().ravel().astype(np.int32)
    codes = np.stack((data >> 4, data & 15), 1).ravel()
    zero = 8 if zeros is None else np.repeat(zeros.numpy().astype(np.int32), blocksize)
    scale = np.repeat(scales.float().numpy(), blocksize)
    return torch.from_numpy((codes - zero).astype(np.float32) * scale)


def e4m3_values() -> np.ndarray:
    """By the definition of OFP8, section 4; the two NaN as 0."""
    values = np.zeros(256, np.float64)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        if code & 0x7F != 0x7F:
            magnitude = (
                mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            )
            values[code] = -magnitude if code & 0x80 else magnitude
    return values.astype(np.float32)


def bytes_oracle(
    codes: Tensor, scales: Tensor, format: str, blocksize: int, shape: tuple[int, int]
) -> Tensor:
    rows, cols = shape
    data = codes.numpy().reshape(shape)
    values = e4m3_values()[data] if format == "fp8" else data.view(np.int8).astype(np.float32)
    if blocksize == 0:
        return torch.from_numpy(values * scales.numpy()[:, None])
    height = blocksize if format == "fp8" else 1
    by_block = scales.numpy().reshape(-(-rows // height), -(-cols // blocksize))
    row, col = np.arange(rows) // height, np.arange(cols) // blocksize
    return torch.from_numpy(values * by_block[row][:, col])


@each_dtype
@each_scale
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_every_code_with_every_zero_point(
    backend: str, blocksize: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    zeros = torch.arange(17, dtype=torch.uint8).repeat_interleave(len(SCALE_BITS))
    scales = torch.tensor(SCALE_BITS, dtype=torch.uint16).view(scale_dtype).repeat(17)
    codes = (
        torch.arange(len(zeros) * blocksize).add(torch.arange(len(zeros)).repeat_interleave(blocksize)) % 16
    )
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
    layout = FORMATS["int4"].layout(blocksize)
    for points in (zeros, None):
        got = ops.dequantize_nf4(packed, scales, None, points, layout, [len(zeros), blocksize], dtype)
        want = int4_oracle(packed, scales, points, blocksize).to(dtype)
        assert_same(got.view(-1), want, "with zero points" if points is not None else "symmetric")


@each_dtype
@pytest.mark.parametrize(
    ("format", "blocksize"), [("fp8", 0), ("fp8", 128), ("int8", 0), ("int8", 64), ("int8", 128)]
)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (7, 63), (64, 64), (128, 128), (129, 257), (300, 96), (2, 1000), (0, 8), (8, 0)]
)
def test_every_code_of_a_byte(
    backend: str, shape: tuple[int, int], format: str, blocksize: int, dtype: torch.dtype
) -> None:
    rows, cols = shape
    codes = torch.arange(rows * cols).mul(7).remainder(256).to(torch.uint8)
    if format == "fp8":
        codes[codes & 0x7F == 0x7F] = 3  # NaN, which no weight has
    form = FORMATS[format]
    scales = testing.tensor(form.scales(shape, blocksize)) * torch.exp2(
        torch.arange(form.scales(shape, blocksize)) % 90 - 45.0
    )
    got = ops.dequantize_nf4(codes, scales, None, None, form.layout(blocksize), list(shape), dtype)
    assert_same(got, bytes_oracle(codes, scales, format, blocksize, shape).to(dtype), f"{shape}")


def test_parts_that_do_not_fit(backend: str) -> None:
    if backend == "reference":
        pytest.skip("reference: plain torch, which has its own errors")
    codes, half = torch.zeros(64 * 128, dtype=torch.uint8), torch.ones(64, dtype=torch.float16)
    fp8, int4 = FORMATS["fp8"].layout(128), FORMATS["int4"].layout(128)
    refused = {
        "packed: expected 8192 bytes": (codes[1:], torch.ones(1), None, None, fp8),
        "absmax: expected 1 elements": (codes, torch.ones(64), None, None, fp8),
        "absmax: expected Float": (codes, half[:1], None, None, fp8),
        "absmax2: expected none": (codes, torch.ones(1), torch.ones(1), None, fp8),
        "only offset": (codes, torch.ones(1), None, torch.ones(1), fp8),
        "absmax: expected Half or BFloat16": (codes[:4096], half.float(), None, None, int4),
        "absmax: expected 64 elements": (codes[:4096], half[1:], None, None, int4),
        "absmax2: expected none for int4": (codes[:4096], half, torch.ones(256), None, int4),
        "offset: expected Byte": (codes[:4096], half, None, torch.ones(64), int4),
        "offset: expected 64 elements": (codes[:4096], half, None, codes[:63], int4),
        "blocksize: expected": (codes, torch.ones(1), None, None, FORMATS["fp8"].layout(64)),
        "absmax: expected 128 elements": (codes, torch.ones(1), None, None, FORMATS["int8"].layout(64)),
        "(blocksize|format): expected": (codes, torch.ones(1), None, None, FORMATS["int8"].layout(32)),
    }
    for message, base in refused.items():
        with pytest.raises(RuntimeError, match=message):
            ops.dequantize_nf4(*base, [64, 128], torch.float32)
