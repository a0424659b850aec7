"""The gated MLP of Llama-like blocks in one op, which keeps x, gate and up for backward and nothing else.

Found by structure: a module with gate, up and down projection whose forward, run on stand-ins for the three,
gives down(activation(gate(x)) * up(x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core import dispatch
from ...core.module_calls import HOOKED
from ...ops.arguments import is_traced
from ...ops.gated import ACTIVATIONS, gated_mlp_args
from ...ops.lora.multi_lora import AdaptedLinear, rounding
from .. import call_cache as repeated
from .. import eligibility as judge
from ..fused import RECORD, Fused, plain_class
from ..lora.forward import FusedLora, prepare

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down in Llama, Mistral, Qwen, Gemma and kin, and in older Mixtral experts."""


@dataclass(frozen=True)
class Settings:
    """What a module without parameters, buffers and children computes with."""

    cls: type[nn.Module]
    values: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a fused MLP was found to be, and what that was found from."""

    names: tuple[str, str, str]
    activation: str
    forward: Callable[..., Any]
    """Of the class, which stand-ins were run through."""
    parts: dict[str, tuple[Any, Settings | None]]
    """What else the forward looked at (`act_fn`), with its settings when it is a module."""

    def changed(self, module: nn.Module) -> str | None:
        """Why the module may compute something else now, or None."""
        d = module.__dict__
        if plain_class(module).forward is not self.forward:
            return "the forward of its class was replaced"
        for name, (part, settings) in self.parts.items():
            now = d["_modules"].get(name)
            if now is None:
                now = d.get(name)
            if now is not part or (settings is not None and type(now) is not settings.cls):
                return f"{name} was replaced"
            if settings is None:
                continue
            # One by one, by name: torch.compile cannot ask for the whole dictionary of a module.
            for key, value in settings.values.items():
                if not _same(getattr(now, key, None), value):
                    return f"{name}.{key} was changed after patch()"
            more = judge.call_of(now)
            if more is not None:
                return f"hooks on {name}, which a fused forward would skip" if more is HOOKED else more
        return None


class FusedMlp(Fused):
    """down(activation(gate(x)) * up(x)) in one op."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None and not is_traced():
            y: Any = repeated.again(self, record, args, kwargs)
            if y is None:
                y = _run(self, record.facts, args, kwargs)
            if isinstance(y, Tensor):
                return y
            if y:
                record.fallbacks[y] += 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _run(module: Any, facts: Facts, args: Any, kwargs: Any) -> Tensor | str:
    if len(args) != 1 or kwargs:
        return f"extra arguments ({', '.join(kwargs) or 'positional'})"
    (x,) = args
    reason = facts.changed(module)
    if reason is not None:
        return reason
    children = module.__dict__["_modules"]
    layers: list[AdaptedLinear] = []
    bases: list[judge.Base] = []
    adapted, dtype = False, x.dtype
    for name in facts.names:
        if len(bases) == 2:  # what down is given
            dtype = torch.promote_types(bases[0].out_dtype, bases[1].out_dtype)
        prepared = prepare(children[name], dtype, x.device)
        if isinstance(prepared, str):
            return prepared and f"{name}: {prepared}"
        base, adapters = prepared
        adapted = adapted or len(adapters) > 0
        bases.append(base)
        layers.append(AdaptedLinear(base.weight, base.bias, adapters))
    if not adapted:  # merged, or without an active adapter
        return ""
    compute = bases[0].compute_dtype
    for name, base in zip(facts.names, bases, strict=True):
        if base.compute_dtype != compute:
            return f"{name}: computes in {base.compute_dtype}, {facts.names[0]} in {compute}"
    gate, up, down = layers
    given, x = x, x.to(compute)
    ops_args = gated_mlp_args(x, gate, up, down, facts.activation, compute)
    y: Tensor = dispatch.call("gated_mlp", x, *ops_args, rounds=rounding(layers, compute))[0]
    drops = any(one.dropout_p for layer in layers for one in layer.adapters)
    if x is given and y.dtype == bases[2].out_dtype and not drops:
        repeated.note(module, x, "gated_mlp", ops_args, lambda seen: _look(module, facts, seen))
    return y.to(bases[2].out_dtype)


def _look(module: Any, facts: Facts, seen: repeated.Seen) -> None:
    """What `_run` saw of the module."""
    children = seen.entry(module.__dict__, "_modules")
    for name in facts.names:
        child = seen.entry(children, name)
        if judge.is_lora(child):
            seen.lora(child, judge.active(child))
            seen.part(child)
        else:
            seen.linear(child)
    seen.unchanged = lambda module: facts.changed(module) is None


def examine(module: nn.Module) -> Facts | str | None:
    """What a fused MLP needs to know; None for a module that is no gated MLP with adapters, and the reason
    for one that cannot run as one op, whatever x is."""
    names, children = projections(module), module._modules
    if names is None or not any(judge.is_lora(children[name]) for name in names):  # type: ignore[arg-type]
        return None
    facts = _facts(module, names)
    if isinstance(facts, str):
        return facts
    for name in names:
        child: Any = children[name]
        if judge.is_lora(child):
            reason = judge.lora_class(child, FusedLora)
            if not reason:  # another class keeps its adapters elsewhere
                active = judge.active(child)
                reason = judge.lora(child, active, FusedLora) or judge.summed(child, active)
        else:
            reason = "" if judge.linear(child) else judge.no_forward(child)
        if reason:
            return f"{name}: {reason}"
    return facts.changed(module) or facts


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of gate, up and down in a module that has nothing else but an activation."""
    children = module._modules
    for names in PROJECTIONS:
        if all(children.get(name) is not None for name in names):
            others = [child for name, child in children.items() if name not in names and child is not None]
            inside = ([*other.parameters(), *other.buffers(), *other.children()] for other in others)
            return None if any(inside) else names
    return None


def _facts(module: nn.Module, names: tuple[str, str, str]) -> Facts | str:
    """Which activation makes the module's forward a gated MLP, found by running it on stand-ins."""

    def gate(x: Tensor) -> Tensor:
        return 2.0 * x - 0.3

    def up(x: Tensor) -> Tensor:
        return x * x + 0.7

    def down(x: Tensor) -> Tensor:
        return 0.5 - 1.5 * x

    x = torch.linspace(-3, 3, 16, dtype=torch.float64).view(1, 2, 8)
    stand_in = _StandIn(module, dict(zip(names, (gate, up, down), strict=True)))
    forward: Any = plain_class(module).forward
    try:
        with torch.random.fork_rng(devices=[]):
            got = forward(stand_in, x)
    except Exception:  # whatever a foreign forward does with what it does not expect
        got = None
    for name, activation in ACTIVATIONS.items():
        expected = down(activation(gate(x))[0] * up(x))
        if isinstance(got, Tensor) and got.shape == x.shape and torch.allclose(got, expected, atol=1e-9):
            parts = {part: (value, _settings(value)) for part, value in stand_in._seen.items()}
            return Facts(names, name, forward, parts)
    return "its forward is not down(activation(gate(x)) * up(x)) with an activation known here"


def _settings(part: Any) -> Settings | None:
    """Those of a module: its own, and its class's, which the instance may come to override. None for anything
    else."""
    if not isinstance(part, nn.Module):
        return None
    cls = type(part)
    names = {name for one in cls.__mro__[: cls.__mro__.index(nn.Module)] for name in _plain_values(one)}
    names |= {name for name in vars(part) if name[0] != "_"}
    return Settings(cls, {name: getattr(part, name) for name in sorted(names - {"training"})})


def _plain_values(cls: type) -> list[str]:
    return [name for name, value in vars(cls).items() if name[0] != "_" and not hasattr(value, "__get__")]


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and bool(a == b))


class _StandIn:
    """A module with some children replaced, in training mode, so that a dropout in its forward shows. Notes
    what else of the module is looked at."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced, _module=module, _seen={}, training=True)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.modules.dropout._DropoutNd):
            return lambda x: nn.functional.dropout(x, value.p)
        if name in self._module._modules or name in vars(self._module):
            self._seen[name] = value
        return value
