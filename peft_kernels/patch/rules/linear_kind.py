"""Kinds of linear layers, by what the forward of their class computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.module_calls import class_forward, is_compiled_by_jit
from ...nf4.sharded.checks import is_sharded, is_tensor_parallel
from ...nf4.weight import PackedWeight
from ...nn import NF4Linear
from ..fused import plain_class
from . import linear4bit, sources
from .calls import ORDINARY
from .stand_in import StandIn, agree
from .verdict import cached, decide, recognise

DENSE, TRANSPOSED, FOUR_BIT = "dense", "transposed", "4-bit"
"""Kinds of linear layers, by what forward computes: x W^T, x W, or x W^T with bitsandbytes' packed W."""

_UNKNOWN = "its forward is neither x W^T nor x W"
_PLAIN: dict[Any, str] = {nn.Linear.forward: DENSE, NF4Linear.forward: DENSE}


def linear_kind(layer: nn.Module) -> str:
    """DENSE, TRANSPOSED or FOUR_BIT, or "" if the forward of the layer is not a known one."""
    cls = plain_class(layer)
    forward = class_forward(cls)
    kind = _PLAIN.get(forward)
    if kind is not None or is_compiled_by_jit(layer):
        return kind or ""
    has_bias = layer._parameters.get("bias") is not None
    key = "linear", cls, forward, has_bias
    found = cached(key)
    if found is None and linear4bit.is_linear4bit(layer):
        same = lambda: linear4bit.expect_same(layer, forward)  # noqa: E731
        found = decide(key, lambda: sources.reason_unknown(forward), same, FOUR_BIT)
    if found is None and _is_plain_matrix(layer._parameters.get("weight")):
        found = recognise(key, lambda: _trial(layer, forward, has_bias), _UNKNOWN)
    return "" if found is None or found.reason else found.computes


def _is_plain_matrix(weight: Any) -> bool:
    return type(weight) in ORDINARY and weight.dim() == 2 and weight.is_floating_point()


def _trial(layer: nn.Module, forward: Any, has_bias: bool) -> str | None:
    return next((kind for kind in (DENSE, TRANSPOSED) if _agrees(layer, forward, kind, has_bias)), None)


def _agrees(layer: nn.Module, forward: Any, kind: str, has_bias: bool) -> bool:
    """Whether a forward computes what this kind does, for 8 features and 5 outputs."""
    weight = torch.linspace(-1, 2, 40, dtype=torch.float64, device="cpu").view(5, 8).sin()
    bias = torch.linspace(0, 1, 5, dtype=torch.float64, device="cpu") if has_bias else None

    def theirs(x: Tensor, training: bool) -> Any:
        given = weight if kind is DENSE else weight.t().contiguous()
        replaced: dict[str, Any] = {
            "weight": given.to(x.dtype),
            "bias": None if bias is None else bias.to(x.dtype),
        }
        replaced |= {"in_features": 8, "nx": 8, "out_features": 5, "nf": 5}
        stand_in = StandIn(layer, replaced, training)
        y = forward(stand_in, x)
        return (y, *stand_in.reads)

    def ours(x: Tensor, training: bool) -> Any:
        return (nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)),)

    return agree(theirs, ours)


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer is a PackedWeight, whole or one rank's shard."""
    weight = layer._parameters.get("weight")
    return isinstance(weight, PackedWeight) or is_sharded(weight) or is_tensor_parallel(weight)


def layer_reason(layer: Any) -> str:
    """Why no fused forward covers a linear layer, for any x."""
    kind = linear_kind(layer)
    if not kind:
        return unsupported_reason(layer)
    return linear4bit.reason(layer.weight) or "" if kind is FOUR_BIT else ""


def unsupported_reason(layer: Any) -> str:
    """Why the forward of a layer without a `linear_kind` cannot be fused."""
    if hasattr(layer, "base_layer"):
        return "another tuner layer lies between it and its base layer; use one tuner"
    return f"no fused forward over a base of type {type(layer).__name__}; nothing to do"
