"""Gated MLPs: a module with gate, up and down projection whose forward, run on a stand-in, returns
down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...ops.gated import ACTIVATIONS
from ..fused import Fallback, plain_class
from .calls import hook_reason
from .stand_in import StandIn, agree

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down in Llama, Mistral, Qwen, Gemma, and in older Mixtral experts."""


_tried: dict[Any, Facts] = {}
"""The facts of a module of each class: a model has an MLP in every layer."""


@dataclass(frozen=True)
class Settings:
    """The state of a module without parameters, buffers and children."""

    cls: type[nn.Module]
    values: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the forward of an MLP computes, and what that was determined from."""

    names: tuple[str, str, str]
    activation: str
    forward: Callable[..., Any]
    """Of the class."""
    parts: dict[str, tuple[Any, Settings | None]]
    """What else the forward read (`act_fn`), with its settings if it is a module."""

    def change_reason(self, module: nn.Module) -> str:
        """Why the module may compute something else now, or ""."""
        d = module.__dict__
        if plain_class(module).forward is not self.forward:
            return "the forward of its class was replaced; patch again"
        for name, (part, settings) in self.parts.items():
            now = d["_modules"].get(name)
            if now is None:
                now = d.get(name)
            if now is not part or (settings is not None and type(now) is not settings.cls):
                return f"{name} was replaced; patch again"
            if settings is None:
                continue
            # One by one, by name: torch.compile cannot read the dictionary of a module as a whole.
            for key, value in settings.values.items():
                if not _same(getattr(now, key, None), value):
                    return f"{name}.{key} was changed after patch(); patch again"
            reason = hook_reason(now)
            if reason:
                return f"{name}: {reason}"
        return ""


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of gate, up and down in a module that has no other child but an activation."""
    children = module._modules
    for names in PROJECTIONS:
        if all(children.get(name) is not None for name in names):
            others = [child for name, child in children.items() if name not in names and child is not None]
            inside = ([*other.parameters(), *other.buffers(), *other.children()] for other in others)
            return None if any(inside) else names
    return None


def mlp(module: nn.Module, names: tuple[str, str, str]) -> Facts | Fallback:
    """What a module with these projections computes, if it is a gated MLP."""
    forward: Any = plain_class(module).forward
    key = plain_class(module), forward, names
    earlier = _tried.get(key)
    found = None if earlier is None else _of_another(earlier, module)
    if found is None:
        found = _trial(module, names, forward)
        if found is not None:
            _tried[key] = found
    return found or Fallback(
        "its forward is not down(activation(gate(x)) * up(x)) with an activation known here; nothing to do"
    )


def _of_another(facts: Facts, module: nn.Module) -> Facts | None:
    """The facts of another module of a class, if what else its forward reads has the same settings."""
    parts: dict[str, tuple[Any, Settings | None]] = {}
    for name, (part, settings) in facts.parts.items():
        own = module._modules.get(name, vars(module).get(name))
        if settings is None or type(own) is not settings.cls:
            if own is not part:
                return None
        elif not all(_same(getattr(own, key, None), value) for key, value in settings.values.items()):
            return None
        parts[name] = own, settings
    return replace(facts, parts=parts)


def _trial(module: nn.Module, names: tuple[str, str, str], forward: Callable[..., Any]) -> Facts | None:
    parts: dict[str, Any] = {}

    def theirs(x: Tensor, training: bool) -> Any:
        stand_in = StandIn(module, dict(zip(names, (_gate, _up, _down), strict=True)), training)
        y = forward(stand_in, x)
        parts.update(stand_in.reads)
        return y

    for name, activation in ACTIVATIONS.items():
        if agree(theirs, partial(_ours, activation)):
            kept = {part: (value, _settings(value)) for part, value in parts.items()}
            return Facts(names, name, forward, kept)
    return None


def _ours(activation: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, training: bool) -> Tensor:
    return _down(activation(_gate(x).double())[0].to(x.dtype) * _up(x))


def _gate(x: Tensor) -> Tensor:
    return 2.0 * x - 0.3


def _up(x: Tensor) -> Tensor:
    return x * x + 0.7


def _down(x: Tensor) -> Tensor:
    return 0.5 - 1.5 * x


def _settings(part: Any) -> Settings | None:
    """The attributes of a module and of its class, which the instance may override later. None for anything
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
