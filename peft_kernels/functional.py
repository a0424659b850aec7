"""Typed, checked calls of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .arguments import (
    AdaptedLinear,
    Adapter,
    autocast_dtype,
    base_of,
    check_activation,
    check_adapter,
    check_bias,
    compute_type,
    flatten,
    new_seed,
    of_or_float,
    shape_of,
    unless_of,
)
from .nf4 import NF4State, NF4Weight

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "dora_linear",
    "gated_activation",
    "gated_mlp",
    "lora_linear",
    "multi_lora_linear",
    "nf4_linear",
]


def nf4_linear(
    x: Tensor,
    weight: NF4Weight | NF4State,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T + bias` with a frozen NF4 weight, dequantised inside the kernel.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16. Sums are in fp32.
    weight : NF4Weight, (out_features, in_features)
    bias : Tensor, (out_features,), optional
        Of x's dtype, of compute_dtype or fp32.
    compute_dtype : torch.dtype, optional
        fp32, bf16 or fp16: x is rounded to it, and so is the result before it gets x's dtype, as in
        bitsandbytes' Linear4bit. By default x's dtype.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x and bias.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; a weight that requires grad.
    """
    if not isinstance(weight, (NF4Weight, NF4State)):
        raise ValueError(f"weight: expected an NF4Weight, got {type(weight).__name__}")
    compute = compute_type(x, compute_dtype)
    shape, group = base_of(x, weight, compute)
    check_bias(x, bias, shape[0], compute)
    return _base_product(x, shape[0], group, bias, compute)


def lora_linear(
    x: Tensor,
    weight: NF4Weight | NF4State | Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T + bias + scaling * (drop(x) A^T) B^T`: base product and low-rank delta (Hu et al. 2021) in one
    call.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16.
    weight : NF4Weight or Tensor, (out_features, in_features)
        The base: NF4 (frozen), or dense in compute_dtype.
    lora_a : Tensor, (r, in_features)
    lora_b : Tensor, (out_features, r)
        fp32 or x's dtype each: an fp32 adapter never makes an fp32 copy of x.
    scaling : float
        alpha / r, or alpha / sqrt(r) for rsLoRA.
    bias : Tensor, (out_features,), optional
        Of x's dtype, of compute_dtype or fp32.
    dropout_p : float
        Probability of dropping an element of x on its way to A; the base product sees x whole. The mask is a
        function of one seed, drawn from torch's generator for x's device: it follows torch.manual_seed and
        activation checkpointing, and is not kept.
    compute_dtype : torch.dtype, optional
        fp32, bf16 or fp16, in which the base product is computed: x, and in backward the output's gradient,
        are rounded to it for that product alone. The delta is computed from x as it is. By default x's dtype.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x, lora_a, lora_b, bias and a dense weight;
    each gradient has its parameter's dtype. Saved for backward: x, x A^T, the seed and the parameters.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; an NF4 weight that requires grad; dropout_p not in 0 to 1.
    """
    compute = compute_type(x, compute_dtype)
    shape, group = base_of(x, weight, compute)
    check_bias(x, bias, shape[0], compute)
    check_adapter(x, shape, lora_a, lora_b, dropout_p)
    adapter = (lora_a, lora_b, float(scaling), float(dropout_p), new_seed(x) if dropout_p else None)
    y, _ = _call("lora_linear", x, *group, bias, *adapter, unless_of(x, compute))
    return y


def dora_linear(
    x: Tensor,
    weight: NF4Weight | NF4State | Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`magnitude / ||V|| * (x V^T) + bias` with V = W + scaling * B A and norms by row: DoRA (Liu et al.
    2024).

    As in PEFT, the norm is a constant for the gradient, and with dropout the base product of the whole x is
    what the dropped one changes: `x W^T + (m / ||V|| - 1) drop(x) W^T + m / ||V|| scaling drop(x) A^T B^T`.
    The norm is made from W A^T, B and A A^T; neither B A nor V is formed, and nothing is cached.

    Parameters
    ----------
    x, weight, lora_a, lora_b, scaling, bias, dropout_p, compute_dtype
        As in `lora_linear`.
    magnitude : Tensor, (out_features,)

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x, lora_a, lora_b, magnitude, bias and a
    dense weight. Saved for backward: what `lora_linear` saves, and one tensor of the output's size.
    """
    compute = compute_type(x, compute_dtype)
    shape, group = base_of(x, weight, compute)
    check_bias(x, bias, shape[0], compute)
    check_adapter(x, shape, lora_a, lora_b, dropout_p)
    if magnitude.shape != (shape[0],):
        raise ValueError(f"magnitude: expected shape ({shape[0]},), got {tuple(magnitude.shape)}")
    base = tuple(t.detach() if isinstance(t, Tensor) else t for t in group)
    norm = _call("dora_norm", *base, lora_a.detach(), lora_b.detach(), float(scaling), like=x)
    scale = magnitude.float() / norm.to(magnitude.dtype).float()
    if not dropout_p:
        z = lora_linear(x, weight, lora_a, lora_b, scaling, bias, compute_dtype=compute_dtype)
        return _call("dora_scale", z, scale, None if bias is None else of_or_float(bias, x.dtype))
    dropped = _call("dropout", x, float(dropout_p), new_seed(x))
    z = lora_linear(dropped, weight, lora_a, lora_b, scaling, compute_dtype=compute_dtype)
    product: Tensor = _call("dora_scale", z, scale, None)
    return _base_product(x - dropped, shape[0], group, bias, compute) + product


def multi_lora_linear(
    x: Tensor,
    layers: Sequence[AdaptedLinear],
    row_group: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Several linear layers on one x, each with any number of adapters, whose deltas are summed.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        Read once for all adapters; saved for backward once.
    layers : sequence of AdaptedLinear
        Query, key and value projection, for example.
    row_group : Tensor, int64, (rows,), optional
        One entry for each row of x (product of its leading sizes): only adapters with that `group` serve the
        row. A group that no adapter has means the base layer alone. Without it, all adapters serve all rows.
    compute_dtype : torch.dtype, optional
        As in `lora_linear`.

    Returns
    -------
    list of Tensor, (..., out_features) each, of x's dtype. Differentiability and errors as `lora_linear`.
    """
    if row_group is not None:
        rows = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else x[..., :1].numel()
        if row_group.shape != (rows,) or row_group.dtype != torch.int64:
            expected, got = (
                f"int64 of shape ({rows},)",
                f"{row_group.dtype} of shape {tuple(row_group.shape)}",
            )
            raise ValueError(f"row_group: expected {expected}, got {got}")
    compute = compute_type(x, compute_dtype)
    features = [x.shape[-1]] * len(layers)
    base, adapters, groups, seed = flatten(x, layers, features, compute, x.dtype)
    y, _ = _call("multi_lora_linear", x, *base, *adapters, seed, groups, row_group, unless_of(x, compute))
    return list(y)


def gated_mlp(
    x: Tensor,
    gate: AdaptedLinear,
    up: AdaptedLinear,
    down: AdaptedLinear,
    activation: str = "silu",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`down(activation(gate(x)) * up(x))`: SwiGLU, GeGLU (Shazeer 2020), each layer with its adapters.

    Saved for backward: x, the outputs of gate and up, x A^T of each adapter and the parameters; the product
    in the middle is made again.

    Parameters
    ----------
    activation : str
        "silu", "gelu", "gelu_tanh" or "relu".
    compute_dtype : torch.dtype, optional
        fp32, bf16 or fp16: x is rounded to it once, and everything inside is as for an x of that dtype. That
        copy alone is saved. The result gets x's dtype. By default x's dtype.
    """
    check_activation(activation)
    compute = compute_type(x, compute_dtype)
    hidden = shape_of(gate)[0]
    if shape_of(up)[0] != hidden:
        raise ValueError(f"up: expected {hidden} output features like gate, got {shape_of(up)[0]}")
    features = [x.shape[-1], x.shape[-1], hidden]
    base, adapters, _, seed = flatten(x, (gate, up, down), features, compute, compute)
    y: Tensor = _call("gated_mlp", x.to(compute), *base, *adapters, seed, activation)[0]
    return y.to(x.dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`activation(gate) * up` in one pass, computed in fp32. Saved for backward: gate and up."""
    check_activation(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        expected, got = f"{gate.dtype} of shape {tuple(gate.shape)}", f"{up.dtype} of {tuple(up.shape)}"
        raise ValueError(f"up: expected {expected} like gate, got {got}")
    y: Tensor = _call("gated_activation", gate, up, activation)
    return y


def _base_product(
    x: Tensor, out_features: int, group: tuple[Any, ...], bias: Tensor | None, compute: torch.dtype
) -> Tensor:
    """x W^T + bias, rounded to `compute`, in x's dtype."""
    if group[1] is None:
        y = _dense_product(x.to(compute), group[0], None if bias is None else bias.to(compute))
    else:
        bias = None if bias is None else of_or_float(bias, compute)
        rounded = x if compute == x.dtype else x.to(compute)
        y = _call("nf4_linear", rounded, *group, out_features, bias)
    return y if compute == x.dtype else y.to(x.dtype)


def _dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In their dtype, whatever autocast says."""
    device = x.device.type
    if autocast_dtype(device) is None:
        return F.linear(x, weight, bias)
    with torch.autocast(device, enabled=False):
        return F.linear(x, weight, bias)


def _call(op: str, *args: Any, like: Tensor | None = None) -> Any:
    """Eager calls skip the public op and the dispatcher's autograd key; traced ones record the public op.
    `like`, by default the first argument, decides which back end serves."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.peft_kernels, op)(*args)
    return dispatch.eager_like(op, args[0] if like is None else like)(*args)
