"""Values that the owners' libraries gave of tensors made here; the libraries are not installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels.nf4.owners import OWNERS


def words(*shape: int, keep: int = 0xFFFFFFFF) -> Tensor:
    found = (torch.arange(torch.Size(shape).numel()) * 2654435761 + 12345).remainder(1 << 32) & keep
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32).view(shape)


def scales(*shape: int, dtype: torch.dtype) -> Tensor:
    return ((torch.arange(torch.Size(shape).numel()) % 11 + 3) / 192).to(dtype).view(shape)


def fp8(*shape: int) -> Tensor:
    numbers = torch.arange(torch.Size(shape).numel())
    codes = (numbers * 37 + 5).remainder(127) + 128 * (numbers % 3 == 0)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).view(shape)


INT4 = {
    "weight_packed": words(12, 8),
    "weight_scale": scales(12, 2, dtype=torch.bfloat16),
    "weight_zero_point": torch.cat((words(1, 2), words(1, 2, keep=0xFFFF))),
    "weight_shape": torch.tensor([12, 64]),
}
AWQ = {"qweight": words(64, 2), "qzeros": words(2, 2), "scales": scales(2, 16, dtype=torch.float16)}
GPTQ = {
    "qweight": words(8, 32),
    "qzeros": words(2, 4, keep=0x77777777),
    "scales": scales(2, 32, dtype=torch.float16),
    "g_idx": torch.arange(64, dtype=torch.int32) // 32,
}
FP8 = {"weight": fp8(130, 200), "weight_scale": scales(2, 2, dtype=torch.float32)}

# `decompress` of compressed-tensors 0.20.1, `dequantize_gemm` of AutoAWQ 0.2.7, and the layer of AutoGPTQ
# 0.7.1 without its kernels, applied to the identity: every 29th, 37th, 71st and 997th value of (out, in).
CASES: dict[str, tuple[dict[str, Tensor], torch.dtype, int, str]] = {
    "compressed-tensors-int4": (INT4, torch.bfloat16, 29, """
    0x0.0p+0 0x1.0p-6 -0x1.0p-3 -0x1.aap-6 -0x1.8p-3 0x1.74p-2 0x1.56p-5 -0x1.8p-4 -0x1.aap-3 0x1.9cp-1
    0x1.8p-2 -0x1.8p-2 0x1.16p-4 0x1.0p-3 0x1.0p-3 -0x1.aap-6 0x1.8p-4 -0x1.cp-3 -0x1.0p-3 -0x1.ep-2
    0x1.74p-2 -0x1.d6p-4 -0x1.44p-1 0x1.4p-1 -0x1.38p-1 0x1.4p-4 0x1.acp-4
    """),
    "awq": (AWQ, torch.float16, 37, """
    0x0.0p+0 -0x1.554p-2 0x1.aa8p-4 -0x1.8p-5 0x1.258p-2 -0x1.ep-2 0x0.0p+0 0x1.758p-2 0x1.0p-2
    0x1.554p-5 0x1.154p-4 -0x1.2p-3 0x1.0p-6 0x1.8p-3 -0x1.d54p-3 -0x1.4p-2 -0x1.0p-4 -0x1.8p-3
    -0x1.154p-4 -0x1.2acp-3 0x1.0p-3 -0x1.554p-6 -0x1.8p-2 -0x1.aacp-4 -0x1.aacp-3 -0x1.cp-3 -0x1.2acp-2
    0x0.0p+0
    """),
    "gptq": (GPTQ, torch.float16, 71, """
    0x1.cp-4 0x1.aa8p-4 0x1.aacp-5 0x1.0p-3 0x1.758p-2 0x0.0p+0 0x1.2a8p-2 0x1.ep-3 -0x1.4p-2 -0x1.6p-3
    0x1.2p-3 0x0.0p+0 0x1.258p-2 0x0.0p+0 0x1.0p-2 0x1.cp-3 0x1.554p-3 0x1.bp-2 0x1.5acp-1 0x1.154p-4
    -0x1.0p-5 0x1.554p-4 0x1.4p-3 -0x1.aacp-5 -0x1.0p-4 0x1.2acp-2 0x1.554p-4 0x1.2p-1 0x1.0p-4
    """),
    "compressed-tensors-fp8": (FP8, torch.float32, 997, """
    -0x1.4p-13 0x1.555556p-5 0x1.d55556p+2 -0x1.4p-6 0x1.aaaaacp+1 0x1.2aaaacp-7 -0x1.8p+0 0x1.155556p-8
    0x1.555556p-1 -0x1.0p-9 0x1.4p-2 0x1.d55556p-11 -0x1.2aaaacp-3 0x1.aaaaacp-12 0x1.155556p-4
    -0x1.555556p-15 0x1.0p-5 0x1.4p+2 -0x1.d55556p-7 0x1.2aaaacp+1 0x1.aaaaacp-8 -0x1.155556p+0 0x1.8p-9
    0x1.0p-1 -0x1.555556p-10 0x1.6p-3 0x1.9p-11
    """),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_of_the_owner(name: str) -> None:
    tensors, dtype, step, listed = CASES[name]
    state, aside = OWNERS[name].read(tensors, "a.weight")
    expected = torch.tensor([float.fromhex(value) for value in listed.split()])
    assert torch.equal(state.dequantize(dtype).float().view(-1)[::step], expected)
    assert state.dequantize(torch.float32).to(dtype).equal(state.dequantize(dtype))
    back = OWNERS[name].write(state, aside, "a.weight")
    assert {key.removeprefix("a.") for key in back} == set(tensors)
    for key, tensor in tensors.items():
        found = back[f"a.{key}"]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
