"""The numbers policy with sums as cards round them: cases in which Triton's interpreter is too good to tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_gated
import test_linear
import test_lora
import test_lora_dropout
import test_lora_multi
import torch

import testing
from peft_kernels.backends import triton

if not triton.BACKEND.interpreted or testing.unavailable("triton") is not None:
    pytest.skip("for Triton's interpreter (make triton)", allow_module_level=True)

import triton_sums


@pytest.fixture(autouse=True)
def _as_on_cards() -> Iterator[None]:
    with triton_sums.as_on_cards():
        yield


pytestmark = pytest.mark.usefixtures("nan_outputs")
