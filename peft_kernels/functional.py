"""Typed, checked calls of the ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .nf4 import NF4Weight

__all__ = ["lora_linear", "nf4_linear"]


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` with a frozen NF4 weight, dequantised inside the kernel.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16. Sums are in fp32.
    weight : NF4Weight, (out_features, in_features)
    bias : Tensor, (out_features,), optional

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x and bias.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; a weight that requires grad.
    """
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"weight: expected an NF4Weight, got {type(weight).__name__}")
    state = weight._state
    _check_linear(x, state.shape, state.packed if state.dense is None else state.dense, bias)
    if state.dense is not None:
        return F.linear(x, state.dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if weight.requires_grad:
        raise ValueError("weight: an NF4 weight cannot be trained, expected requires_grad=False, got True")
    return _call("nf4_linear", x, *state.op_args, state.shape[0], bias)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`x W^T + bias + scaling * (x A^T) B^T`: base product and low-rank delta (Hu et al. 2021) in one call.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16.
    weight : NF4Weight or Tensor, (out_features, in_features)
        The base: NF4 (frozen), or dense in x's dtype.
    lora_a : Tensor, (r, in_features)
    lora_b : Tensor, (out_features, r)
        fp32 or x's dtype each: an fp32 adapter never makes an fp32 copy of x.
    scaling : float
        alpha / r, or alpha / sqrt(r) for rsLoRA.
    bias : Tensor, (out_features,), optional
    dropout_p : float
        Only 0 in this version.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x, lora_a, lora_b, bias and a dense weight;
    each gradient has its parameter's dtype. Saved for backward: x, x A^T and the parameters.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; an NF4 weight that requires grad.
    """
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: expected 0.0 (no fused dropout in this version), got {dropout_p}")
    group: tuple[Any, ...]
    if isinstance(weight, NF4Weight) and not weight.is_dense:
        state = weight._state
        if weight.requires_grad:
            raise ValueError(
                "weight: an NF4 weight cannot be trained, expected requires_grad=False, got True"
            )
        shape, group = state.shape, state.op_args
        _check_linear(x, shape, state.packed, bias)
    else:
        dense = weight._state.dense if isinstance(weight, NF4Weight) else weight
        assert dense is not None
        if dense.dim() != 2:
            raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(dense.shape)}")
        shape = (dense.shape[0], dense.shape[1])
        _check_linear(x, shape, dense, bias)
        if isinstance(weight, NF4Weight):
            dense = dense.to(x.dtype)
        elif dense.dtype != x.dtype:
            raise ValueError(f"weight: expected {x.dtype} like x, got {dense.dtype}")
        group = (dense, None, None, None, 0)
    if lora_a.dim() != 2 or lora_a.shape[1] != shape[1]:
        raise ValueError(f"lora_a: expected shape (r, {shape[1]}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (shape[0], lora_a.shape[0]):
        raise ValueError(f"lora_b: expected shape {(shape[0], lora_a.shape[0])}, got {tuple(lora_b.shape)}")
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: expected {x.dtype} like x or float32, got {adapter.dtype}")
        if adapter.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {adapter.device}")
    y, _ = _call("lora_linear", x, *group, bias, lora_a, lora_b, float(scaling), 0.0, None)
    return y


def _check_linear(x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x: expected shape (..., {shape[1]}), got {tuple(x.shape)}")
    if weight is not None and weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} like x, got {weight.device}")
    if bias is not None:
        if bias.shape != (shape[0],):
            raise ValueError(f"bias: expected shape ({shape[0]},), got {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias: expected device {x.device} like x, got {bias.device}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"bias: expected {x.dtype} like x or float32, got {bias.dtype}")


def _call(op: str, *args: Any) -> Any:
    """Eager calls skip the public op, one Python dispatch less; traced ones record it."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.peft_kernels, op)(*args)
    return dispatch.kernel(op, args)(*args)
