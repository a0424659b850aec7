"""Skips tests whose back end cannot run here, with the reason."""

from __future__ import annotations

import pickle

import pytest
import torch

import testing
from peft_kernels.triton_kernels import backend as triton
from ptx import triton_driver


def require(backend_id: str) -> None:
    if (reason := testing.unavailable(backend_id)) is not None:
        pytest.skip(f"{backend_id}: {reason}")


def require_bf16_attention() -> None:
    """torch's attention in bf16 raises where ATEN_CPU_CAPABILITY is below what oneDNN finds."""
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        pytest.skip(f"torch's attention: {error}")


def require_pickles(stock: torch.nn.Module) -> None:
    """With `kernels` installed, transformers 5.25 makes modules of classes that no pickle can name."""
    try:
        pickle.dumps(stock)
    except AttributeError as error:
        pytest.skip(f"the stock model has no pickle: {error}")


def needs(backend_id: str) -> pytest.MarkDecorator:
    reason = testing.unavailable(backend_id)
    return pytest.mark.skipif(reason is not None, reason=f"{backend_id}: {reason}")


on_triton = pytest.mark.skipif(
    not triton.BACKEND.interpreted and triton_driver.wanted() is None,
    reason="for Triton's interpreter (make triton), or compiled to PTX (make triton-ptx)",
)
