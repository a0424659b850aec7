"""The gated MLP of Llama-like blocks in one op, which saves only x, gate and up for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core import dispatch
from ...ops.arguments import is_traced
from ...ops.gated import gated_mlp_args
from ...ops.lora.multi_lora import AdaptedLinear, rounding
from ..call_cache import Guards, cached_call, store
from ..fused import RECORD, Fallback, Fused, computed_by, has
from ..input_spec import input_spec
from ..lora.forward import adapted_operands, sum_reason
from ..rules.examination import Examination, Layers
from ..rules.gated_mlp import Facts, mlp, projections
from ..rules.linear import Base
from ..rules.linear_kind import linear_kind, unsupported_reason
from ..rules.lora import active_adapters, is_lora


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
    facts = mlp(module, names)
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


def facts_of(module: nn.Module) -> Facts | Fallback:
    """What a module computes if it is a gated MLP, patched or not."""
    if has(module, FusedMlp):
        facts: Facts = module.__dict__[RECORD].facts
        return facts
    names = projections(module)
    return Fallback("it is not a gated MLP; nothing to do") if names is None else mlp(module, names)
