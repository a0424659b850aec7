"""Our formats against the libraries that own them: dequantised values to the bit."""

from __future__ import annotations

import pytest
import torch
from bnb_layers import bnb_functional, quantized
from nf4_oracle import assert_same
from nf4_weights import dtype_id, each_dtype, each_nesting
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core.formats import FORMATS, e4m3_values, e8m0_values

ops = torch.ops.peft_kernels
CPU = torch.device("cpu")

# bitsandbytes' FP4. Its CPU kernel is wrong where blocks cross rows.
WHOLE = [(40, 64), (64, 128), (7, 64)]


@each_dtype
@each_nesting
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_fp4_of_bitsandbytes(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    params = quantized(testing.tensor(*shape, dtype=dtype), kind="fp4", nested=nested)
    weight = pk.NF4Weight.from_bnb(params)
    assert_same(
        weight.dequantize(dtype), bnb_functional.dequantize_4bit(params.data, params.quant_state), "values"
    )
    back = weight.to_bnb()
    assert back.quant_state.quant_type == back.quant_type == "fp4"
    assert_same(bnb_functional.dequantize_4bit(back.data, back.quant_state), weight.dequantize(dtype), "back")


@each_dtype
@each_nesting
@pytest.mark.parametrize("shape", [*WHOLE, (33, 96), (7, 33)], ids=str)
def test_quantising_to_fp4_as_bitsandbytes_does(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype
) -> None:
    """The same scales, but for an 8-bit code that bitsandbytes looks up in a coarse table (test_nf4_bnb.py),
    and the same values but for ties, which its back ends decide in different ways."""
    dense = testing.tensor(*shape, dtype=dtype)
    theirs = pk.NF4Weight.from_bnb(quantized(dense, kind="fp4", nested=nested))
    ours = pk.NF4Weight.quantize(dense, double_quant=nested, format="fp4")
    for name in ("absmax2", "offset"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) is (other is None) and (one is None or torch.equal(one, other)), name
    alike = ours.absmax == theirs.absmax
    assert (~alike).sum() <= (5 if nested else 0)  # of 128 at most, 0.15% each
    got, want = ours.dequantize(torch.float32), theirs.dequantize(torch.float32)
    far = (got - dense.float()).abs() - (want - dense.float()).abs()
    blocks = alike.repeat_interleave(ours._state.blocksize)[: got.numel()].view(shape)
    differ = (got != want) & blocks
    assert differ.sum() <= 0.01 * got.numel()
    scale = dense.float().abs().max()
    shift = 0.02 if nested else 1e-5  # double-quantised scales shift ties
    assert (far[differ].abs() <= shift * scale).all()


# MXFP4 of transformers, for GPT-OSS.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_mxfp4_of_transformers(dtype: torch.dtype) -> None:
    """With every scale code but 255, which stands for NaN."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    experts, out, groups = 2, 51, 5
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), generator=generator, dtype=torch.uint8)
    scales = (torch.arange(experts * out * groups) % 255).to(torch.uint8).view(experts, out, groups)
    want = mxfp4._convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(
        1, 2
    )  # (experts, out, in)
    swapped = blocks << 4 | blocks >> 4  # its first element is in the low nibble
    layout = FORMATS["mxfp4"].layout(32)
    for e in range(experts):
        args = swapped[e].reshape(-1), scales[e].reshape(-1), e8m0_values(CPU), None, layout
        got = ops.dequantize_nf4(*args, [out, groups * 32], dtype)
        assert_same(got, want[e].contiguous(), f"expert {e}")


# NVFP4 of compressed-tensors 0.20.1, which is not installed here: every 7th value of what its `dequantize`
# makes, in fp32, of these bytes, scale codes and global scale.
NVFP4_BYTES = (torch.arange(4 * 16) * 37 + 5).remainder(256).to(torch.uint8).view(4, 16)
NVFP4_SCALES = torch.tensor([[1, 8], [0x38, 0x53], [0x7E, 0x2B], [0, 0x66]], dtype=torch.uint8)
NVFP4_GLOBAL = 1234.5
NVFP4_VALUES = """
    0x1.3e85c0p-18 0x1.3e85c0p-17 -0x0p+0 0x1.3e85c0p-14 -0x1.3e85c0p-16 0x1.3e85c0p-8 -0x1.a8b256p-9
    0x1.b5f7eap-5 0x1.23fa9cp-8 -0x0p+0 0x1.739c0cp-1 -0x0p+0 0x1.b5f7eap-10 -0x0p+0 -0x0p+0 -0x0p+0
    -0x1.16b508p-3 -0x0p+0 0x0p+0
"""


def nvfp4(values: Tensor) -> Tensor:
    """The weight above, given the values of the scale codes."""
    swapped = NVFP4_BYTES << 4 | NVFP4_BYTES >> 4
    args = swapped.view(-1), NVFP4_SCALES.view(-1), values, None, FORMATS["nvfp4"].layout(16)
    found: Tensor = ops.dequantize_nf4(*args, [4, 32], torch.float32)
    return found


def test_nvfp4_of_compressed_tensors(backend: str) -> None:
    if not backend.startswith(("reference", "cpu")):
        pytest.skip(f"{backend}: has NF4's codes only")
    want = torch.tensor([float.fromhex(value) for value in NVFP4_VALUES.split()])
    assert_same(nvfp4(e4m3_values(CPU) / NVFP4_GLOBAL).view(-1)[::7].contiguous(), want, "values")


def test_nvfp4_keeps_its_whole_range() -> None:
    """One scale for the weight gives the largest block the largest scale code, and values within a step of
    E2M1."""
    dense = testing.uneven(testing.tensor(8, 64, scale=3e-3))
    weight = pk.NF4Weight.quantize(dense, format="nvfp4")
    assert weight.absmax.max() == 0x7E  # 448
    largest = dense.view(-1, 16).abs().amax(1, keepdim=True)
    error = (weight.dequantize(torch.float32) - dense).view(-1, 16).abs()
    assert (error <= largest * (1 / 6 + 2**-4 + 1e-6)).all()
