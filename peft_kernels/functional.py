"""Typed, checked calls of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .backends.base import DTYPES
from .nf4 import NF4State, NF4Weight
from .reference import ACTIVATIONS

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
    compute = _compute_type(x, compute_dtype)
    shape, group = _base(x, weight, compute)
    _check_bias(x, bias, shape[0], compute)
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
    compute = _compute_type(x, compute_dtype)
    shape, group = _base(x, weight, compute)
    _check_bias(x, bias, shape[0], compute)
    _check_adapter(x, shape, lora_a, lora_b, dropout_p)
    adapter = (lora_a, lora_b, float(scaling), float(dropout_p), _seed(x) if dropout_p else None)
    y, _ = _call("lora_linear", x, *group, bias, *adapter, _unless_of(x, compute))
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
    compute = _compute_type(x, compute_dtype)
    shape, group = _base(x, weight, compute)
    _check_bias(x, bias, shape[0], compute)
    _check_adapter(x, shape, lora_a, lora_b, dropout_p)
    if magnitude.shape != (shape[0],):
        raise ValueError(f"magnitude: expected shape ({shape[0]},), got {tuple(magnitude.shape)}")
    base = tuple(t.detach() if isinstance(t, Tensor) else t for t in group)
    norm = _call("dora_norm", *base, lora_a.detach(), lora_b.detach(), float(scaling), like=x)
    scale = magnitude.float() / norm.to(magnitude.dtype).float()
    if not dropout_p:
        z = lora_linear(x, weight, lora_a, lora_b, scaling, bias, compute_dtype=compute_dtype)
        return _call("dora_scale", z, scale, None if bias is None else _of_or_float(bias, x.dtype))
    dropped = _call("dropout", x, float(dropout_p), _seed(x))
    z = lora_linear(dropped, weight, lora_a, lora_b, scaling, compute_dtype=compute_dtype)
    product: Tensor = _call("dora_scale", z, scale, None)
    return _base_product(x - dropped, shape[0], group, bias, compute) + product


@dataclass
class Adapter:
    """One LoRA adapter of a layer: lora_a (r, in_features), lora_b (out_features, r)."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float = 0.0
    group: int = 0
    """Of rows that the adapter serves, where a call says the group of each row."""


@dataclass
class AdaptedLinear:
    """A frozen linear layer, weight (out_features, in_features), and its adapters."""

    weight: NF4Weight | NF4State | Tensor
    bias: Tensor | None = None
    adapters: Sequence[Adapter] = ()


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
    compute = _compute_type(x, compute_dtype)
    features = [x.shape[-1]] * len(layers)
    base, adapters, groups, seed = _flatten(x, layers, features, compute, x.dtype)
    y, _ = _call("multi_lora_linear", x, *base, *adapters, seed, groups, row_group, _unless_of(x, compute))
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
    _check_activation(activation)
    compute = _compute_type(x, compute_dtype)
    hidden = _shape_of(gate)[0]
    if _shape_of(up)[0] != hidden:
        raise ValueError(f"up: expected {hidden} output features like gate, got {_shape_of(up)[0]}")
    features = [x.shape[-1], x.shape[-1], hidden]
    base, adapters, _, seed = _flatten(x, (gate, up, down), features, compute, compute)
    y: Tensor = _call("gated_mlp", x.to(compute), *base, *adapters, seed, activation)[0]
    return y.to(x.dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`activation(gate) * up` in one pass, computed in fp32. Saved for backward: gate and up."""
    _check_activation(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        expected, got = f"{gate.dtype} of shape {tuple(gate.shape)}", f"{up.dtype} of {tuple(up.shape)}"
        raise ValueError(f"up: expected {expected} like gate, got {got}")
    y: Tensor = _call("gated_activation", gate, up, activation)
    return y


def _flatten(
    x: Tensor,
    layers: Sequence[AdaptedLinear],
    in_features: Sequence[int],
    compute: torch.dtype,
    inside: torch.dtype,
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[int], Tensor | None]:
    """Layers as the lists that ops take: those of the bases, those of the adapters, groups, seed. `inside` is
    the dtype of the activations that the op gets."""
    groups, shapes, biases = [], [], []
    none = x.new_empty(0)
    a, b, layer, scaling, dropout_p, group = [], [], [], [], [], []
    for j, (item, features) in enumerate(zip(layers, in_features, strict=True)):
        shape, base = _base(x, item.weight, compute, features)
        _check_bias(x, item.bias, shape[0], compute)
        groups.append(base)
        shapes.append(shape[0])
        biases.append(none if item.bias is None else _of_or_float(item.bias, inside, compute))
        for adapter in item.adapters:
            _check_adapter(x, shape, adapter.lora_a, adapter.lora_b, adapter.dropout_p, inside)
            a.append(adapter.lora_a)
            b.append(adapter.lora_b)
            layer.append(j)
            scaling.append(float(adapter.scaling))
            dropout_p.append(float(adapter.dropout_p))
            group.append(adapter.group)
    seed = _seed(x) if any(dropout_p) else None
    weights = tuple(list(column) for column in zip(*groups, strict=True))
    return (*weights, shapes, biases), (a, b, layer, scaling, dropout_p), group, seed


def _seed(x: Tensor) -> Tensor:
    return torch.randint(0, 2**63 - 1, (), device=x.device)


def _shape_of(layer: AdaptedLinear) -> tuple[int, int]:
    shape = layer.weight.shape
    return shape[0], shape[1]


def _compute_type(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Of the base product."""
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if compute_dtype is None:
        return x.dtype
    if compute_dtype not in DTYPES:
        expected = "torch.float32, torch.bfloat16 or torch.float16"
        raise ValueError(f"compute_dtype: expected {expected}, got {compute_dtype}")
    return compute_dtype


def _unless_of(x: Tensor, compute: torch.dtype) -> torch.dtype | None:
    """The argument of ops: none where the base product is in x's own dtype."""
    return None if compute == x.dtype else compute


def _of_or_float(bias: Tensor, *dtypes: torch.dtype) -> Tensor:
    """In a dtype that an op takes: one of `dtypes`, or fp32."""
    return bias if bias.dtype in dtypes else bias.float()


def _base_product(
    x: Tensor, out_features: int, group: tuple[Any, ...], bias: Tensor | None, compute: torch.dtype
) -> Tensor:
    """x W^T + bias, rounded to `compute`, in x's dtype."""
    if group[1] is None:
        y = _dense_product(x.to(compute), group[0], None if bias is None else bias.to(compute))
    else:
        bias = None if bias is None else _of_or_float(bias, compute)
        y = _call("nf4_linear", x.to(compute), *group, out_features, bias)
    return y.to(x.dtype)


def _dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In their dtype, whatever autocast says."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return F.linear(x, weight, bias)
    with torch.autocast(device, enabled=False):
        return F.linear(x, weight, bias)


def _base(
    x: Tensor,
    weight: NF4Weight | NF4State | Tensor,
    compute: torch.dtype,
    in_features: int | None = None,
) -> tuple[tuple[int, int], tuple[Any, ...]]:
    """Shape of the weight, and the five arguments that ops take it as for a product in `compute`. Checked
    against x or `in_features`."""
    state = weight._state if isinstance(weight, NF4Weight) else weight
    dense = state.dense if isinstance(state, NF4State) else state
    if dense is None:
        assert isinstance(state, NF4State)
        if isinstance(weight, NF4Weight) and weight.requires_grad:
            raise ValueError(
                "weight: an NF4 weight cannot be trained, expected requires_grad=False, got True"
            )
        group: tuple[Any, ...] = state.op_args
        shape: Any = state.shape
    else:
        if dense.dim() != 2:
            raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(dense.shape)}")
        if isinstance(state, NF4State):
            dense = dense.to(compute)
        elif dense.dtype != compute:
            like = "x" if compute == x.dtype else "compute_dtype"
            raise ValueError(f"weight: expected {compute} like {like}, got {dense.dtype}")
        shape, group = dense.shape, (dense, None, None, None, 0)
    device = group[0].device
    if in_features is None:
        if x.dim() == 0 or x.shape[-1] != shape[1]:
            raise ValueError(f"x: expected shape (..., {shape[1]}), got {tuple(x.shape)}")
    elif shape[1] != in_features:
        raise ValueError(f"weight: expected {in_features} input features, got {shape[1]}")
    if device != x.device:
        raise ValueError(f"weight: expected device {x.device} like x, got {device}")
    return (shape[0], shape[1]), group


def _check_bias(x: Tensor, bias: Tensor | None, out_features: int, compute: torch.dtype) -> None:
    if bias is None:
        return
    if bias.shape != (out_features,):
        raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias: expected device {x.device} like x, got {bias.device}")
    if bias.dtype not in (x.dtype, compute, torch.float32):
        like = "x" if compute == x.dtype else f"x, {compute}"
        raise ValueError(f"bias: expected {x.dtype} like {like} or float32, got {bias.dtype}")


def _check_adapter(
    x: Tensor,
    shape: tuple[int, int],
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float,
    inside: torch.dtype | None = None,
) -> None:
    dtype = inside or x.dtype
    if lora_a.dim() != 2 or lora_a.shape[1] != shape[1]:
        raise ValueError(f"lora_a: expected shape (r, {shape[1]}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (shape[0], lora_a.shape[0]):
        raise ValueError(f"lora_b: expected shape {(shape[0], lora_a.shape[0])}, got {tuple(lora_b.shape)}")
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype not in (dtype, torch.float32):
            like = "x" if dtype == x.dtype else "compute_dtype"
            raise ValueError(f"{name}: expected {dtype} like {like} or float32, got {adapter.dtype}")
        if adapter.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {adapter.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected 0 to 1, got {dropout_p}")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _call(op: str, *args: Any, like: Tensor | None = None) -> Any:
    """Eager calls skip the public op and the dispatcher's autograd key; traced ones record the public op.
    `like`, by default the first argument, decides which back end serves."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.peft_kernels, op)(*args)
    return dispatch.eager_like(op, args[0] if like is None else like)(*args)
