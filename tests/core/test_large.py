"""More than 2^31 weights: every index must be 64 bits wide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import ONE_MODEL
from skips import require

import testing
from peft_kernels.core.backends import cpu

N, K, BLOCKSIZE = 32771, 65536, 4096  # 2^31 + 196,608 weights
NEEDED_GIB = 7


def free_gib() -> float:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """fp16 (N, K), zero except for the last three rows and the first two, which a wrapped index would hit."""
    require("cpu")
    if free_gib() < NEEDED_GIB:
        pytest.skip(f"{free_gib():.1f} GiB of memory free, {NEEDED_GIB} needed")
    zeros = torch.from_numpy(
        np.zeros((N, K), np.float16)
    )  # pages of a fresh calloc cost nothing until written
    zeros[-3:] = testing.tensor(3, K, dtype=torch.float16, scale=0.02)
    zeros[:2] = 1.0
    assert zeros.numel() > 2**31
    return zeros


@pytest.mark.slow
def test_more_than_2_31_weights(weight: torch.Tensor) -> None:
    ops, tail = torch.ops.peft_kernels_cpu, weight[-3:]
    packed, absmax = ops.quantize_nf4(weight, BLOCKSIZE)
    want_packed, want_absmax = ops.quantize_nf4(tail, BLOCKSIZE)
    assert packed.numel() == N * K // 2 and absmax.numel() == N * K // BLOCKSIZE
    assert torch.equal(packed[-want_packed.numel() :], want_packed)
    assert torch.equal(absmax[-want_absmax.numel() :], want_absmax)
    assert (packed[K : K + 4096] == 0x77).all() and (
        absmax[2 * K // BLOCKSIZE : -want_absmax.numel()] == 0
    ).all()

    group = (absmax, None, None, BLOCKSIZE)
    want = ops.dequantize_nf4(want_packed, want_absmax, None, None, BLOCKSIZE, [3, K], torch.float32)
    x = testing.tensor(1, K)
    y = ops.nf4_linear(x, packed, *group, N, None)
    assert testing.relative_error(y[:, -3:], x.double() @ want.double().t()) < ONE_MODEL
    assert (y[:, 2:-3] == 0).all() and torch.allclose(y[:, :2], x.sum().expand(1, 2), rtol=1e-3, atol=1e-2)

    dy = torch.zeros(1, N)
    dy[0, -3:] = torch.tensor([1.0, -2.0, 3.0])
    dx = ops.nf4_linear_dx(dy, packed, *group, K)
    assert testing.relative_error(dx, dy[:, -3:].double() @ want.double()) < ONE_MODEL


def packed_tail(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A packed weight, of which only the tail is written, and the tail alone."""
    packed = torch.from_numpy(np.zeros(N * K // 2, np.uint8))
    absmax = torch.from_numpy(np.zeros(N * K // BLOCKSIZE, np.float32))
    tail_packed, tail_absmax = torch.ops.peft_kernels_cpu.quantize_nf4(weight[-3:], BLOCKSIZE)
    packed[-tail_packed.numel() :] = tail_packed
    absmax[-tail_absmax.numel() :] = tail_absmax
    return packed, absmax, tail_packed, tail_absmax


@pytest.mark.slow
def test_dequantize_more_than_2_31_weights(weight: torch.Tensor) -> None:
    """The output takes 4 GiB."""
    ops = torch.ops.peft_kernels_cpu
    packed, absmax, want_packed, want_absmax = packed_tail(weight)
    out = ops.dequantize_nf4(packed, absmax, None, None, BLOCKSIZE, [N, K], torch.float16)
    want = ops.dequantize_nf4(want_packed, want_absmax, None, None, BLOCKSIZE, [3, K], torch.float16)
    assert torch.equal(out[-3:], want) and (out[:3] == 0).all() and (out[-4] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("isa", testing.ISA_LEVELS)
def test_more_than_2_31_weights_on_every_isa(weight: torch.Tensor, isa: str) -> None:
    require(f"cpu-{isa}")
    ops = torch.ops.peft_kernels_cpu
    packed, absmax, tail_packed, tail_absmax = packed_tail(weight)
    x = testing.tensor(1, K)
    with cpu.BACKEND.use_isa(isa):
        y = ops.nf4_linear(x, packed, absmax, None, None, BLOCKSIZE, N, None)
        want = ops.nf4_linear(x, tail_packed, tail_absmax, None, None, BLOCKSIZE, 3, None)
    assert torch.equal(y[:, -3:], want) and (y[:, :-3] == 0).all()
