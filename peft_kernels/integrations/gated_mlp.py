"""The gated MLP of Llama-like blocks in one op, which keeps x, gate and up for backward and nothing else.

Found by structure: a module with gate, up and down projection whose forward, run on stand-ins for the three,
gives down(activation(gate(x)) * up(x)).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import gated_mlp
from ..reference import ACTIVATIONS
from .lora import Call
from .shared_input import is_plain, prepare_summed

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down in Llama, Mistral, Qwen, Gemma and kin, and in older Mixtral experts."""


def examine(module: nn.Module) -> tuple[str | None, Callable[..., Any] | None, str]:
    """See `layers.examine`."""
    names = projections(module)
    if names is None or not any(hasattr(getattr(module, name), "lora_A") for name in names):
        return None, None, ""
    kind = f"gated MLP {type(module).__name__}"
    activation = activation_of(module, names)
    if activation is None:
        return (
            kind,
            None,
            "its forward is not down(activation(gate(x)) * up(x)) with an activation known here",
        )
    return kind, functools.partial(forward, names=names, activation=activation), ""


def forward(
    module: Any,
    x: Tensor,
    *args: Any,
    fallbacks: Counter[str],
    names: tuple[str, str, str],
    activation: str,
    **kwargs: Any,
) -> Tensor:
    """The MLP's forward in one op."""
    if any(is_plain(getattr(module, name)) for name in names):
        return type(module).forward(module, x, *args, **kwargs)
    reason = f"extra arguments ({', '.join(kwargs) or 'positional'})" if args or kwargs else None
    calls: list[Call] = []
    for name in names:
        if reason is None:
            call = prepare_summed(getattr(module, name), x)
            if isinstance(call, str):
                reason = f"{name}: {call}"
            elif calls and (call.dtype != calls[0].dtype or call.out_dtype != call.dtype):
                reason = f"{name}: computes in {call.dtype}"
            else:
                calls.append(call)
    if reason is not None:
        fallbacks[reason] += 1
        return type(module).forward(module, x, *args, **kwargs)
    gate, up, down = (call.layer for call in calls)
    return gated_mlp(x.to(calls[0].dtype), gate, up, down, activation).to(calls[-1].out_dtype)


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of gate, up and down in a module that has nothing else but an activation."""
    for names in PROJECTIONS:
        children = dict(module.named_children())
        if set(names) <= children.keys():
            others = [child for name, child in children.items() if name not in names]
            if any(True for other in others for _ in other.parameters()):
                return None
            return names
    return None


def activation_of(module: nn.Module, names: tuple[str, str, str]) -> str | None:
    """Which activation makes the module's forward a gated MLP, found by running it on stand-ins."""

    def gate(x: Tensor) -> Tensor:
        return 2.0 * x - 0.3

    def up(x: Tensor) -> Tensor:
        return x * x + 0.7

    def down(x: Tensor) -> Tensor:
        return 0.5 - 1.5 * x

    x = torch.linspace(-3, 3, 16, dtype=torch.float64).view(1, 2, 8)
    try:
        got = type(module).forward(_StandIn(module, dict(zip(names, (gate, up, down), strict=True))), x)
    except Exception:  # whatever a foreign forward does with what it does not expect
        return None
    for name, activation in ACTIVATIONS.items():
        expected = down(activation(gate(x))[0] * up(x))
        if isinstance(got, Tensor) and got.shape == x.shape and torch.allclose(got, expected, atol=1e-9):
            return name
    return None


class _StandIn:
    """A module with some children replaced, in training mode, so that a dropout in its forward shows."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced, _module=module, training=True)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.modules.dropout._DropoutNd):
            return lambda x: nn.functional.dropout(x, value.p)
        return value
