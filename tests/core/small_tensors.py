"""The sizes of ops' samples, and small tensors of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import testing

N, K, R = 20, 34, 4


def group(nested: bool) -> tuple[Any, ...]:
    return testing.nf4_weight(N, K, 32, nested)._state.op_args


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, transposed: bool = False) -> Tensor:
    values = testing.tensor(*shape, dtype=dtype, seed=seed)
    return (values.t() if transposed else values).requires_grad_()
