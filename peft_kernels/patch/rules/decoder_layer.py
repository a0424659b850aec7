"""Decoder layers like Llama's: x + attention(norm(x)), then the same with the MLP."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...core.module_calls import class_forward
from ..fused import plain_class
from .stand_in import StandIn, agree, unwrapped
from .verdict import Verdict, cached, recognise

NORM_NAMES = ("input_layernorm", "post_attention_layernorm")
"""The norms of a decoder layer, as Llama names them."""

_UNKNOWN = "its forward is not x + attention(norm(x)), then x + mlp(norm(x)); nothing to do"


def layer(module: nn.Module) -> tuple[tuple[str, Any], ...] | None:
    """The arguments after x, with their defaults, of a decoder layer with Llama's forward; None for any other
    module."""
    computes: tuple[tuple[str, Any], ...] | None = _verdict(module, plain_class(module)).computes
    return computes


def layer_of_subclass(module: nn.Module) -> str:
    """The class with Llama's forward that the class of a decoder layer replaces the forward of, or ""."""
    above = (cls for cls in plain_class(module).__mro__[1:] if issubclass(cls, nn.Module))
    return next((cls.__name__ for cls in above if _verdict(module, cls).computes is not None), "")


def _verdict(module: nn.Module, cls: Any) -> Verdict:
    if not all(module._modules.get(name) is not None for name in (*NORM_NAMES, "self_attn", "mlp")):
        return Verdict(reason=_UNKNOWN)
    key = "decoder layer", cls, class_forward(cls)
    return cached(key) or recognise(key, lambda: _trial(module, cls.forward), _UNKNOWN)


def _trial(module: nn.Module, forward: Any) -> tuple[tuple[str, Any], ...] | None:
    inner = unwrapped(forward)
    if inner is None:
        return None
    _, _, *others = inspect.signature(inner).parameters.values()
    defaults = tuple((one.name, one.default) for one in others if one.kind is one.POSITIONAL_OR_KEYWORD)
    given = {name: f"the {name}" for name, _ in defaults}
    if any(one.kind is one.VAR_KEYWORD for one in others):
        given["more"] = "another argument"
    same = (
        agree(partial(_theirs, module, inner, kwargs), partial(_ours, kwargs))
        for kwargs in (given, dict.fromkeys(given))
    )
    return defaults if all(same) else None


def _first_norm(x: Tensor) -> Tensor:
    return 0.25 * x - 0.3


def _second_norm(x: Tensor) -> Tensor:
    return 0.7 - 0.5 * x


def _mlp(x: Tensor) -> Tensor:
    return x * x.flip(-1) + 0.5


def _ours(kwargs: dict[str, Any], x: Tensor, training: bool) -> Any:
    x = x + _attention(_first_norm(x))[0]
    return (x + _mlp(_second_norm(x)), [kwargs])


def _attention(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, str]:
    return 0.5 * hidden_states + hidden_states.flip(-1), "the weights"


def _theirs(module: nn.Module, forward: Any, kwargs: dict[str, Any], x: Tensor, training: bool) -> Any:
    calls: list[dict[str, Any]] = []

    def attention(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, str]:
        calls.append(kwargs)
        return _attention(hidden_states)

    replaced = {NORM_NAMES[0]: _first_norm, NORM_NAMES[1]: _second_norm, "self_attn": attention, "mlp": _mlp}
    stand_in = StandIn(module, replaced, training)
    y = forward(stand_in, x, **kwargs)
    return (y, calls, *stand_in.reads)
