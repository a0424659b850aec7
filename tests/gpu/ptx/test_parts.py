"""Dequantised parts of a weight equal the whole: ops only use few kinds of parts, of large weights."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from numbers_policy import each_dtype

import ptx_backend as ptx
import testing

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# (rows, columns) of the weight, then of the part: first row and column, rows, columns.
PARTS = {
    "all": ((5, 64), (0, 0, 5, 64)),
    "columns": ((300, 200), (0, 16, 300, 24)),
    "two-units": ((500, 64), (3, 8, 490, 16)),
    "many-units": ((7, 1032), (0, 8, 7, 1016)),
    "odd-units": ((60, 320), (1, 0, 59, 56)),
    "one-row": ((3, 320), (1, 8, 1, 104)),
    "odd-column": ((9, 64), (0, 3, 9, 16)),
    "odd-width": ((9, 64), (2, 8, 5, 17)),
    "odd-weight": ((9, 33), (1, 1, 8, 30)),
}


def check_part(machine: ModuleType, part: str, dtype: torch.dtype) -> None:
    (n, k), (row, column, rows, columns) = PARTS[part]
    weight = testing.nf4_weight(n, k, 32, False)._state
    assert weight.packed is not None and weight.absmax is not None
    whole = testing.reference_op("dequantize_nf4")(*weight.op_args, [n, k], dtype)
    for stride in (columns, columns + 8, columns + 5):
        out = torch.full((rows, stride), float("nan"), dtype=dtype)
        machine.dequantize_part(
            weight.packed.data_ptr(),
            weight.absmax.data_ptr(),
            5,
            (row, row + rows, column, column + columns, k),
            out.data_ptr(),
            stride,
            DTYPE_CODES[dtype],
        )
        assert torch.equal(out[:, :columns], whole[row : row + rows, column : column + columns])
        assert out[:, columns:].isnan().all(), "written outside of the part"


@each_dtype
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_weight(machine: ModuleType, part: str, dtype: torch.dtype) -> None:
    check_part(machine, part, dtype)


def test_a_write_past_the_end_is_a_fault(machine: ModuleType) -> None:
    weight = testing.nf4_weight(64, 64, 32, False)._state
    assert weight.packed is not None and weight.absmax is not None
    with ptx.BACKEND.guarding():
        out = torch.empty(63, 64)
    addresses = (weight.packed.data_ptr(), weight.absmax.data_ptr())
    with pytest.raises(RuntimeError, match=r"nf4_dequantize\.cuh:\d+: segmentation fault"):
        machine.dequantize_part(*addresses, 5, (0, 64, 0, 64, 64), out.data_ptr(), 64, 0)
    machine.dequantize_part(*addresses, 5, (0, 63, 0, 64, 64), out.data_ptr(), 64, 0)
