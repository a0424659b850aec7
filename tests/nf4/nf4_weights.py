"""Makes NF4 weights and compares them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"even": (12, 64), "odd": (7, 33)}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_nesting = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(
    shape: tuple[int, int] = (12, 64), nested: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1
) -> pk.NF4Weight:
    return pk.NF4Weight.quantize(testing.tensor(*shape, dtype=dtype, seed=seed), 32, nested)


COPIES: dict[str, Callable[[pk.NF4Weight], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": models.pickled,
    "torch.save": models.saved_and_loaded,
    "torch.save-weights-only": lambda w: models.saved_and_loaded(w, weights_only=True),
    "clone": lambda w: w.clone(),
    "detach-clone": lambda w: w.detach().clone(),
    "to-copy": lambda w: w.to("cpu", copy=True),
    "parameter-deepcopy": lambda w: copy.deepcopy(nn.Parameter(w, requires_grad=False)),
}


def parts(weight: pk.NF4Weight) -> dict[str, Tensor]:
    return weight._state.tensors()


def assert_equal_weights(got: Tensor, want: pk.NF4Weight) -> None:
    assert isinstance(got, pk.NF4Weight)
    assert (got.shape, got.dtype, got.blocksize, got.double_quant, got._state.format) == (
        want.shape, want.dtype, want.blocksize, want.double_quant, want._state.format,
    )  # fmt: skip
    assert parts(got).keys() == parts(want).keys()
    for name, tensor in parts(want).items():
        # Values of scale codes include NaN.
        torch.testing.assert_close(parts(got)[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_shares_nothing(a: pk.NF4Weight, b: pk.NF4Weight) -> None:
    assert a._state is not b._state
    for name in parts(a):
        assert parts(a)[name].data_ptr() != parts(b)[name].data_ptr(), name
