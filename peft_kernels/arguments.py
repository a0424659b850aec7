"""The arguments of the typed calls in `functional`: checked, and as the ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends.base import DTYPES
from .nf4 import NF4State, NF4Weight
from .reference import ACTIVATIONS


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on devices of this type; None where it is off, or unknown (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


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


def flatten(
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
        shape, base = base_of(x, item.weight, compute, features)
        check_bias(x, item.bias, shape[0], compute)
        groups.append(base)
        shapes.append(shape[0])
        biases.append(none if item.bias is None else of_or_float(item.bias, inside, compute))
        for adapter in item.adapters:
            check_adapter(x, shape, adapter.lora_a, adapter.lora_b, adapter.dropout_p, inside)
            a.append(adapter.lora_a)
            b.append(adapter.lora_b)
            layer.append(j)
            scaling.append(float(adapter.scaling))
            dropout_p.append(float(adapter.dropout_p))
            group.append(adapter.group)
    seed = new_seed(x) if any(dropout_p) else None
    weights = tuple(list(column) for column in zip(*groups, strict=True))
    return (*weights, shapes, biases), (a, b, layer, scaling, dropout_p), group, seed


def new_seed(x: Tensor) -> Tensor:
    return torch.randint(0, 2**63 - 1, (), device=x.device)


def shape_of(layer: AdaptedLinear) -> tuple[int, int]:
    shape = layer.weight.shape
    return shape[0], shape[1]


def compute_type(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Of the base product."""
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if compute_dtype is None or compute_dtype == x.dtype:
        return x.dtype
    if compute_dtype not in DTYPES:
        expected = "torch.float32, torch.bfloat16 or torch.float16"
        raise ValueError(f"compute_dtype: expected {expected}, got {compute_dtype}")
    return compute_dtype


def unless_of(x: Tensor, compute: torch.dtype) -> torch.dtype | None:
    """The argument of ops: none where the base product is in x's own dtype."""
    return None if compute == x.dtype else compute


def of_or_float(bias: Tensor, *dtypes: torch.dtype) -> Tensor:
    """In a dtype that an op takes: one of `dtypes`, or fp32."""
    return bias if bias.dtype in dtypes else bias.float()


def base_of(
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


def check_bias(x: Tensor, bias: Tensor | None, out_features: int, compute: torch.dtype) -> None:
    if bias is None:
        return
    if bias.shape != (out_features,):
        raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias: expected device {x.device} like x, got {bias.device}")
    if bias.dtype not in (x.dtype, compute, torch.float32):
        like = "x" if compute == x.dtype else f"x, {compute}"
        raise ValueError(f"bias: expected {x.dtype} like {like} or float32, got {bias.dtype}")


def check_adapter(
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


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
