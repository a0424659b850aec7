"""Rotary embedding on CUDA: heads of many lengths and layouts as PTX, what a call launches, and the compiled
code."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from block_samples import angles
from numbers_policy import DTYPES, at_odd_address, short
from skips import needs
from stub_device import H100, stub_device, torch_ops
from torch import Tensor

import ptx_backend as ptx
import testing

needs_stub = needs("ptx")
FLOAT = torch.float32


def check(x: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool, dtype: torch.dtype) -> None:
    """Bit-equal to torch."""
    args = x, cos, sin, inverse, dtype
    for got, want in zip(
        torch.ops.peft_kernels_ptx.rotary(*args), testing.reference_op("rotary")(*args), strict=True
    ):
        assert torch.equal(got, want) and got.dtype == dtype and got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("angle", DTYPES, ids=lambda dtype: f"by_{short(dtype)}")
@pytest.mark.parametrize("result", DTYPES, ids=lambda dtype: f"to_{short(dtype)}")
def test_every_kernel_is_correct(
    extension: ModuleType, dtype: torch.dtype, angle: torch.dtype, result: torch.dtype
) -> None:
    """Blocks with several rows, the last ones with fewer, and rows with more work than a block has threads;
    with and without vectors; heads in all parts of the unrolled loop."""
    for i, (features, heads) in enumerate(
        ((64, (9, 3)), (128, (32, 8)), (256, (70,)), (2, (1,)), (6, (40, 1, 2, 3, 5)), (80, (4, 2)))
    ):
        x = [testing.tensor(2, 11, count, features, dtype=dtype, seed=j) for j, count in enumerate(heads)]
        for inverse in (False, True):
            check(x, *angles(1 + i % 2, 11, features, angle), inverse, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("moved", ["x", "cos", "sin", "stride", "angle-stride", "expanded", "features"])
def test_any_layout(extension: ModuleType, moved: str, dtype: torch.dtype) -> None:
    """Layouts without vectors, and with."""
    x, (cos, sin) = testing.tensor(2, 5, 3, 32, dtype=dtype), angles(2, 5, 32, dtype)
    if moved == "x":
        x = at_odd_address(x)
    elif moved == "cos":
        cos = at_odd_address(cos)
    elif moved == "sin":
        sin = at_odd_address(sin)
    elif moved == "stride":
        x = testing.tensor(2, 5, 3, 33, dtype=dtype)[..., :32]
    elif moved == "angle-stride":
        cos, sin = (testing.tensor(2, 5, 33, dtype=dtype, seed=i)[..., :32] for i in (1, 2))
    elif moved == "expanded":
        cos, sin = cos[:1].expand(2, 5, 32), sin[:, :1].expand(2, 5, 32)
    else:
        x, cos = (torch.stack([t, t], -1)[..., 0] for t in (x, cos))
    check([x, x[:, :, :1]], cos, sin, False, dtype)
    check([x.transpose(1, 2).contiguous().transpose(1, 2)], cos, sin, True, dtype)


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)], ids=str)
def test_nothing_to_rotate(extension: ModuleType, shape: tuple[int, ...]) -> None:
    """Also next to a tensor that has elements."""
    cos, sin = angles(1, shape[1], shape[3])
    x = [torch.ones(shape), testing.tensor(shape[0], shape[1], 2, shape[3])]
    for tensors in (x, x[::-1], []):
        check(tensors, cos, sin, False, FLOAT)


def test_more_than_2_31_elements_apart(extension: ModuleType) -> None:
    """Of a tensor most of which is never read."""
    stride = 2**31 + 64
    memory = torch.from_numpy(np.zeros(stride + 5 * 128, np.float16))
    x = memory.as_strided((2, 5, 2, 64), (stride, 128, 64, 1))
    x.copy_(testing.tensor(2, 5, 2, 64, dtype=torch.float16))
    check([x], *angles(1, 5, 64, torch.float16), False, torch.float16)


def test_order_of_threads_changes_no_bit(extension: ModuleType) -> None:
    x = [testing.tensor(2, 9, heads, 64, dtype=torch.bfloat16) for heads in (9, 3)]
    cos, sin = angles(2, 9, 64, torch.bfloat16)
    ptx.BACKEND.check_order(3, lambda: torch.ops.peft_kernels_ptx.rotary(x, cos, sin, False, torch.bfloat16))


@needs_stub
def test_launches() -> None:
    """One for up to four tensors; torch only allocates."""
    cos = torch.ones(1, 70, 128, dtype=torch.bfloat16)
    for heads, blocks in (((32,), [36]), ((32, 8), [36 + 10]), ((32, 8, 1, 1, 4), [36 + 10 + 6 + 6, 6])):
        x = [torch.ones(2, 70, each, 128, dtype=torch.bfloat16) for each in heads]
        with stub_device(H100) as launches:
            called = torch_ops(
                lambda x=x: torch.ops.peft_kernels_ptx.rotary(x, cos, cos, False, torch.bfloat16)
            )
            found = launches()
        assert {launch.kernel for launch in found} == {"RotaryHalves<bf16, bf16, 8>"}
        assert [launch.blocks for launch in found] == blocks
        assert called.keys() <= {"aten::empty", "aten::to"}
