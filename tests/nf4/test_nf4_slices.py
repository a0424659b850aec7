"""Row and column slices of an NF4 weight."""

from __future__ import annotations

import pytest
import torch
from rounding import ONE_STEP
from torch import nn

import peft_kernels as pk
import testing
from peft_kernels.nf4.sharded.tp_slices import (
    encode_scales,
    one_level_scales,
    slice_size,
    slice_state,
    unsliceable_reason,
)

WHOLE = [
    ((6, 128), 64, 0, 4, "leave some of 4 processes without any"),
    ((6, 96), 64, 0, 2, "a cut after 3 of its rows of 96 goes through a block of 64"),
    ((64, 192), 64, 1, 2, "its 192 columns, 96 for each of 2 processes, are not whole blocks of 64"),
    ((64, 130), 64, 1, 2, "are not whole blocks"),
    ((64, 2), 64, 1, 3, "2 columns of it leave some of 3"),
    ((2, 4, 64), 64, 0, 2, "expected a weight"),
]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(128, 128), (8, 16384), (7, 256), (5, 320), (8, 96), (9, 63)])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_slice_equals_the_dense_slice(shape: tuple[int, int], nested: bool, dim: int, count: int) -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(*shape, seed=1), 64, nested)
    if unsliceable_reason(shape, "nf4", 64, dim, count):
        assert shape[1] % 64 or (dim == 1 and slice_size(shape[1], count) % 64)
        return
    size, second = slice_size(shape[dim], count), weight._state.absmax2
    for part in range(count):
        start, stop = part * size, min((part + 1) * size, shape[dim])
        state = slice_state(weight._state, dim, start, stop)
        mine = pk.NF4Weight(state, torch.float32)
        assert torch.equal(mine.dequantize(), weight.dequantize().narrow(dim, start, stop - start))
        own = [t for t in state.tensors().values() if t.numel()]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in own), "a view of the whole"
        if second is not None:
            kept = dim == 0 and start * shape[1] // 64 % 256 == 0
            assert (state.absmax2 is not None) == kept
        x = testing.tensor(3, stop - start if dim else shape[1], seed=2)
        want = x @ weight.dequantize().narrow(dim, start, stop - start).T
        torch.testing.assert_close(nn.functional.linear(x, mine), want, rtol=ONE_STEP, atol=ONE_STEP)


@pytest.mark.parametrize("format, blocksize", [("fp4", 64), ("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_other_formats(format: str, blocksize: int, dim: int) -> None:
    shape, count = (6, 192), 3
    weight = pk.NF4Weight.quantize(testing.uneven(testing.tensor(*shape, seed=1)), blocksize, format=format)
    assert not unsliceable_reason(shape, "nf4", blocksize, dim, count)
    size = slice_size(shape[dim], count)
    for start in range(0, shape[dim], size):
        state = slice_state(weight._state, dim, start, start + size)
        assert state.format == format
        mine = pk.NF4Weight(state, torch.float32)
        want = weight.dequantize().narrow(dim, start, size)
        assert torch.equal(mine.dequantize(), want)
        x = testing.tensor(3, want.shape[1], seed=2)
        torch.testing.assert_close(nn.functional.linear(x, mine), x @ want.T, rtol=ONE_STEP, atol=ONE_STEP)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.tensors().values()), "a view"


@pytest.mark.parametrize("shape,blocksize,dim,count,reason", WHOLE)
def test_unsliceable_weights_are_refused(
    shape: tuple[int, ...], blocksize: int, dim: int, count: int, reason: str
) -> None:
    assert reason in unsliceable_reason(shape, "nf4", blocksize, dim, count)


def test_nested_scale_codes_round_trip() -> None:
    state = pk.NF4Weight.quantize(testing.tensor(300, 192, seed=3), 64)._state
    assert state.absmax is not None and state.absmax2 is not None and state.offset is not None
    second = state.absmax2, state.offset
    codes = encode_scales(one_level_scales(state)[0], second)
    assert codes is not None and torch.equal(codes, state.absmax)
    assert encode_scales(one_level_scales(state)[0] * 1.001, second) is None
