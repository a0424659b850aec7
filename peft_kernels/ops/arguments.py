"""Checks and conversions of arguments that typed calls share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.backends.base import DTYPES
from ..core.op import Base
from ..core.packed_state import HoldsPacked, PackedState

Weight = HoldsPacked | PackedState | Tensor
"""(out_features, in_features): a PackedWeight, its state, or a dense tensor."""


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype for a device type; None where autocast is off, or unsupported (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which autocast is off for a device type."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def is_traced() -> bool:
    """Whether TorchScript traces: it cannot record ops that take lists of layers or adapters, and values of
    tensors hold only for this call."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()  # compilers cannot trace _is_tracing


def compute_type(x: Tensor, compute_dtype: torch.dtype | None, name: str = "x") -> torch.dtype:
    """Dtype of the base GEMM. `name`: the name of x in errors."""
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
    if compute_dtype is None or compute_dtype == dtype:
        return dtype
    if compute_dtype not in DTYPES:
        expected = "torch.float32, torch.bfloat16 or torch.float16"
        raise ValueError(f"compute_dtype: expected {expected}, got {compute_dtype}")
    return compute_dtype


def bias_for_op(bias: Tensor, *dtypes: torch.dtype) -> Tensor:
    """The bias in one of `dtypes` or fp32, as ops take it."""
    return bias if bias.dtype in dtypes else bias.float()


def base_weight(
    x: Tensor, weight: Weight, compute: torch.dtype, in_features: int | None = None, name: str = "x"
) -> tuple[tuple[int, int], Base]:
    """The weight's shape, and the weight as ops take it for a GEMM in `compute`. Raises ValueError unless it
    fits x or `in_features`."""
    state: Any = weight._state if isinstance(weight, HoldsPacked) else weight
    packed = isinstance(state, PackedState)
    dense = state.merged_values() if packed else state
    if dense is None:
        if state is not weight and _requires_grad(weight):
            raise ValueError(
                "weight: an NF4 weight cannot be trained, expected requires_grad=False, got True"
            )
        shape, base = state.shape, state.op_args
        if len(shape) != 2:
            raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(shape)}")
    else:
        if dense.dim() != 2:
            raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(dense.shape)}")
        if packed:
            dense = dense.to(compute)
        elif dense.dtype != compute:
            like = name if compute == x.dtype else "compute_dtype"
            raise ValueError(f"weight: expected {compute} like {like}, got {dense.dtype}")
        shape, base = dense.shape, Base(dense)
    if in_features is None:
        if x.dim() == 0 or x.shape[-1] != shape[1]:
            raise ValueError(f"{name}: expected shape (..., {shape[1]}), got {tuple(x.shape)}")
    elif shape[1] != in_features:
        raise ValueError(f"weight: expected {in_features} input features, got {shape[1]}")
    if base.weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} like {name}, got {base.weight.device}")
    return (shape[0], shape[1]), base


def check_bias(
    x: Tensor, bias: Tensor | None, out_features: int, compute: torch.dtype, name: str = "x"
) -> None:
    if bias is None:
        return
    if bias.shape != (out_features,):
        raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias: expected device {x.device} like {name}, got {bias.device}")
    if bias.dtype not in (x.dtype, compute, torch.float32):
        like = name if compute == x.dtype else f"{name}, {compute}"
        raise ValueError(f"bias: expected {x.dtype} like {like} or float32, got {bias.dtype}")


def _requires_grad(tensor: Any) -> bool:
    """tensor.requires_grad without __torch_function__, which costs a microsecond; compilers need the
    latter."""
    if torch.compiler.is_compiling():
        return bool(tensor.requires_grad)
    return torch._C._any_requires_grad(tensor)
