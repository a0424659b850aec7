"""Makes NF4 weights and compares them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"even": (12, 64), "odd": (7, 33)}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_nesting = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(
    shape: tuple[int, int] = (12, 64), nested: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1
) -> pk.NF4Weight:
    return pk.NF4Weight.quantize(testing.tensor(*shape, dtype=dtype, seed=seed), 32, nested)


def parts(weight: pk.NF4Weight) -> dict[str, Tensor]:
    return weight._state.tensors()


def assert_equal_weights(got: Tensor, want: pk.NF4Weight) -> None:
    assert isinstance(got, pk.NF4Weight)
    assert (got.shape, got.dtype, got.blocksize, got.double_quant) == (
        want.shape, want.dtype, want.blocksize, want.double_quant,
    )  # fmt: skip
    assert parts(got).keys() == parts(want).keys()
    for name, tensor in parts(want).items():
        assert torch.equal(parts(got)[name], tensor), name


def assert_shares_nothing(a: pk.NF4Weight, b: pk.NF4Weight) -> None:
    assert a._state is not b._state
    for name in parts(a):
        assert parts(a)[name].data_ptr() != parts(b)[name].data_ptr(), name
