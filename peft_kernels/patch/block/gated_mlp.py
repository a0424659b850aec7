"""The gated MLP of Llama-like blocks in one op, which saves only x, gate and up for backward.

Recognised by its structure: a module with gate, up and down projection whose forward, run with simple
functions instead of the three, returns down(activation(gate(x)) * up(x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core import dispatch
from ...ops.arguments import is_traced
from ...ops.gated import ACTIVATIONS, gated_mlp_args
from ...ops.lora.multi_lora import AdaptedLinear, rounding
from ..call_cache import Guards, cached_call, store
from ..eligibility import Base, hook_reason, linear_kind, unsupported_reason
from ..examination import Examination, Layers
from ..fused import RECORD, Fallback, Fused, computed_by, has, plain_class
from ..input_spec import input_spec
from ..lora.eligibility import active_adapters, is_lora
from ..lora.forward import adapted_operands, sum_reason

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down in Llama, Mistral, Qwen, Gemma, and in older Mixtral experts."""


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


def _run(module: Any, *args: Any, **kwargs: Any) -> Tensor | Fallback:
    if is_traced():
        return Fallback()
    record = module.__dict__[RECORD]
    call = cached_call(module, record, args, kwargs)
    return _prepare_and_run(module, record.facts, args, kwargs) if call is None else call(*args)


@computed_by(_run)
class FusedMlp(Fused):
    """down(activation(gate(x)) * up(x)) in one op."""


def _prepare_and_run(module: Any, facts: Facts, args: Any, kwargs: Any) -> Tensor | Fallback:
    if len(args) != 1 or kwargs:
        return Fallback(f"extra arguments ({', '.join(kwargs) or 'positional'}); call it without them")
    (x,) = args
    if reason := facts.change_reason(module):
        return Fallback(reason)
    children = module.__dict__["_modules"]
    layers: list[AdaptedLinear] = []
    bases: list[Base] = []
    adapted, spec = False, input_spec(x.dtype, x.device)
    for name in facts.names:
        if len(bases) == 2:  # the input of down
            spec = spec._replace(dtype=torch.promote_types(bases[0].out_dtype, bases[1].out_dtype))
        operands = adapted_operands(children[name], spec)
        if isinstance(operands, Fallback):
            return Fallback(operands.reason and f"{name}: {operands.reason}")
        base, adapters = operands
        adapted = adapted or len(adapters) > 0
        bases.append(base)
        layers.append(AdaptedLinear(base.weight, base.bias, adapters))
    if not adapted:  # merged, or without an active adapter
        return Fallback()
    compute = bases[0].compute_dtype
    for name, base in zip(facts.names, bases, strict=True):
        if base.compute_dtype != compute:
            return Fallback(
                f"{name}: computes in {base.compute_dtype}, {facts.names[0]} in {compute}; use one dtype"
            )
    gate, up, down = layers
    cast = x.to(compute)
    op_args = gated_mlp_args(cast, gate, up, down, facts.activation, compute)
    y: Tensor = dispatch.call("gated_mlp", cast, *op_args, rounds=rounding(layers, compute))[0]
    drops = any(one.dropout_p for layer in layers for one in layer.adapters)
    if cast is x and y.dtype == bases[2].out_dtype and not drops:
        again = lambda x: dispatch.call("gated_mlp", x, *op_args)[0]  # noqa: E731
        store(module, x, again, op_args, lambda guards: _guard(module, facts, guards))
    return y.to(bases[2].out_dtype)


def _guard(module: Any, facts: Facts, guards: Guards) -> None:
    """Guards all that `_prepare_and_run` read of the module."""
    children = guards.expect_same(module.__dict__, "_modules")
    for name in facts.names:
        child = guards.expect_same(children, name)
        if is_lora(child):
            guards.expect_lora(child, active_adapters(child))
            guards.expect_untouched(child)
        else:
            guards.expect_linear(child)
    guards.unchanged = lambda module: not facts.change_reason(module)


def examine(module: nn.Module, layers: Layers) -> Examination | None:
    """Examines a gated MLP with adapters."""
    names, children = projections(module), module._modules
    if names is None or not any(is_lora(children[name]) for name in names):  # type: ignore[arg-type]
        return None
    facts = _facts(module, names)
    if isinstance(facts, Fallback):
        reason = facts.reason
    else:
        reasons = ((name, _projection_reason(children[name], layers)) for name in names)
        reason = next((f"{name}: {reason}" for name, reason in reasons if reason), "")
        reason = reason or facts.change_reason(module)
    return Examination.of("gated MLP", module, FusedMlp, reason, facts)


def _projection_reason(child: Any, layers: Layers) -> str:
    if is_lora(child):
        return sum_reason(child, layers)
    return "" if linear_kind(child) else unsupported_reason(child)


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of gate, up and down in a module that has no other child but an activation."""
    children = module._modules
    for names in PROJECTIONS:
        if all(children.get(name) is not None for name in names):
            others = [child for name, child in children.items() if name not in names and child is not None]
            inside = ([*other.parameters(), *other.buffers(), *other.children()] for other in others)
            return None if any(inside) else names
    return None


def facts_of(module: nn.Module) -> Facts | Fallback:
    """What a module computes if it is a gated MLP, patched or not."""
    if has(module, FusedMlp):
        facts: Facts = module.__dict__[RECORD].facts
        return facts
    names = projections(module)
    return Fallback("it is not a gated MLP; nothing to do") if names is None else _facts(module, names)


def _facts(module: nn.Module, names: tuple[str, str, str]) -> Facts | Fallback:
    """The activation with which the module's forward is a gated MLP, found by running it on a stand-in."""

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
    except Exception:  # an unknown forward may raise anything
        got = None
    for name, activation in ACTIVATIONS.items():
        expected = down(activation(gate(x))[0] * up(x))
        if isinstance(got, Tensor) and got.shape == x.shape and torch.allclose(got, expected, atol=1e-9):
            parts = {part: (value, _settings(value)) for part, value in stand_in._read.items()}
            return Facts(names, name, forward, parts)
    return Fallback(
        "its forward is not down(activation(gate(x)) * up(x)) with an activation known here; nothing to do"
    )


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


class _StandIn:
    """A module with some children replaced, in training mode, so that dropout in its forward has an effect.
    Records which other attributes of the module are read."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced, _module=module, _read={}, training=True)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.modules.dropout._DropoutNd):
            return lambda x: nn.functional.dropout(x, value.p)
        if name in self._module._modules or name in vars(self._module):
            self._read[name] = value
        return value
