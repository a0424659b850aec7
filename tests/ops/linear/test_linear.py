"""nf4_linear and nf4_linear_dx by the numbers policy, on every back end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from lora_cases import ROWS, check_nf4_linear, check_nf4_linear_dx
from numbers_policy import DTYPES, FEATURES, case_id, dense64

import testing
from peft_kernels import NF4Weight

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")


LINEAR_CASES = testing.pairwise(
    m=ROWS,
    n=FEATURES,
    k=FEATURES,
    bs=(32, 64, 128, 4096),
    nested=(True, False),
    dtype=DTYPES,
    bias=("none", "same", "fp32"),
    layout=testing.LAYOUTS,
)
each_linear_case = pytest.mark.parametrize("case", LINEAR_CASES, ids=case_id)


@each_linear_case
def test_nf4_linear(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear(case)


@each_linear_case
def test_nf4_linear_dx(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear_dx(case)


@pytest.mark.parametrize("rows", [3, 40])
def test_values_of_scale_codes_in_large_blocks(backend: str, rows: int) -> None:
    """As MXFP4 and NVFP4 have them in blocks of 32 and 16: a kernel that reads scales does not take them."""
    state = testing.nf4_weight(128, 192, 64, False)._state
    codes = (torch.arange(128 * 3) % 256).byte()
    values = 1 + torch.arange(256) / 256
    plain = NF4Weight(dataclasses.replace(state, absmax=values[codes.long()]), torch.float32)
    by_code = (state.packed, codes, values, None, state.op_args[-1])
    for op, features, out, w in (
        (ops.nf4_linear, 192, (128, None), dense64(plain).t()),
        (ops.nf4_linear_dx, 128, (192,), dense64(plain)),
    ):
        x = testing.tensor(rows, features, dtype=torch.bfloat16)
        got, want = (op(x, *args, *out) for args in (by_code, plain._state.op_args))
        testing.assert_close(got, want, x.double() @ w)
