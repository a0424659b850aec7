"""The self-test of a card passes the Triton kernels as the interpreter runs them."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.core.backends.self_test import cases, compare
from peft_kernels.triton_kernels import backend as triton
from peft_kernels.triton_kernels.core import launch

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="for Triton's interpreter (make triton)")


@interpreted
@pytest.mark.parametrize("op", filter(triton.BACKEND.has_kernel, cases.CASES))
def test_right_kernels_pass(op: str) -> None:
    assert compare.fault_of(op, triton.BACKEND.namespace, torch.device("cpu"), torch.bfloat16) is None
