"""Attention modules like Llama's: the projections of queries, keys and values in one op, their rotary
embedding in another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...ops.arguments import autocast_dtype, is_traced
from ...ops.block.rotary import rotary
from ...ops.lora.multi_lora import AdaptedLinear, multi_lora_linear
from ..fused import Fallback, computed_by
from ..input_spec import input_spec
from ..lora.forward import adapted_operands, sum_reason
from ..rules import attention as rule
from ..rules.attention import PROJECTIONS, Attention
from ..rules.calls import ORDINARY, device_reason
from ..rules.examination import Examination, Layers
from ..rules.linear import Base
from ..rules.lora import is_lora
from . import empty_cache
from .attention_function import AttentionFacts, FusedAttentionFunction, function_reason, has_choice

_ROUNDING = ("eager", "sdpa", "peft_kernels")
"""Attention functions whose inputs autocast rounds."""


def _run(
    module: Any,
    hidden_states: Any = None,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the original forward returns, or a Fallback."""
    if torch.compiler.is_compiling() or is_traced():  # a compiler fuses the embedding with its neighbours
        return Fallback()
    known, reason, _ = rule.attention(module)
    if reason:
        return Fallback(reason)
    x = hidden_states
    if len(args) > 1 or not supports(module, x, position_embeddings):
        return Fallback()
    cos, sin = position_embeddings
    cache = args[0] if args else kwargs.pop(known.cache, None)
    if "past_key_values" in kwargs:  # its old name
        return Fallback()
    projected = _project(module, x)
    if isinstance(projected, Fallback):
        return projected
    values, dtypes = projected
    rounded = rounds_to(module, cache, x.device.type)
    if rounded is None or known.normed:
        values = [t.to(dtype) for t, dtype in zip(values, dtypes, strict=True)]
    q, k, v = (t.view(*x.shape[:-1], -1, module.head_dim) for t in values)
    if known.normed:
        q, k = module.q_norm(q), module.k_norm(k)
    if not known.rotates or getattr(module, known.rotates):
        q, k = rotary(q, k, cos, sin, rounded)
    if rounded is not None:
        q, k, v = (t.to(rounded) for t in (q, k, v))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    y, weights = attend(module, known, heads, position_embeddings, attention_mask, cache, kwargs)
    return module.o_proj(y.reshape(*x.shape[:-1], -1).contiguous()), weights


@computed_by(_run)
class FusedAttention(FusedAttentionFunction):
    """Queries, keys and values from one op, rotated by another."""


def supports(module: Any, x: Any, position_embeddings: Any) -> bool:
    """Whether our ops compute such a call. fp64 runs their references, as in LoRA layers."""
    if not isinstance(position_embeddings, (tuple, list)) or len(position_embeddings) != 2:
        return False
    cos, sin = position_embeddings
    dtypes = (*DTYPES, torch.float64)
    if any(type(t) not in ORDINARY or t.dtype not in dtypes or t.dim() != 3 for t in (x, cos, sin)):
        return False
    batch, rows = x.shape[:2]
    return (
        not device_reason(x, "rotary")
        and cos.shape[0] in (1, batch)
        and cos.shape[1:] == (rows, module.head_dim)
        and module.head_dim % 2 == 0
        and (cos.shape, cos.dtype, cos.device) == (sin.shape, sin.dtype, sin.device)
        and cos.device == x.device
        and not (cos.requires_grad or sin.requires_grad)
    )


def _project(module: Any, x: Tensor) -> tuple[Sequence[Tensor], Sequence[torch.dtype]] | Fallback:
    """Queries, keys and values in the dtypes they were computed in, and the dtypes the modules would return.
    Without active adapters the modules are called."""
    children = module.__dict__["_modules"]
    layers: list[AdaptedLinear] = []
    bases: list[Base] = []
    adapted = False
    spec = input_spec(x.dtype, x.device)
    for name in PROJECTIONS if any(is_lora(children[name]) for name in PROJECTIONS) else ():
        operands = adapted_operands(children[name], spec)
        if isinstance(operands, Fallback):
            if operands.reason:
                return Fallback(f"{name}: {operands.reason}")
            adapted = False
            break
        base, adapters = operands
        adapted = adapted or len(adapters) > 0
        bases.append(base)
        layers.append(AdaptedLinear(base.weight, base.bias, adapters))
    if not adapted:
        values = [children[name](x) for name in PROJECTIONS]
        return values, [t.dtype for t in values]
    compute, dtype = bases[0].compute_dtype, bases[0].dtype
    for name, base in zip(PROJECTIONS, bases, strict=True):
        if (base.compute_dtype, base.dtype) != (compute, dtype):
            return Fallback(
                f"{name}: computes in {base.compute_dtype}, {PROJECTIONS[0]} in {compute}; use one dtype"
            )
    if compute == spec.autocast:  # which rounds the input of adapters too
        dtype = compute
    return multi_lora_linear(x.to(dtype), layers, None, compute), [base.out_dtype for base in bases]


def rounds_to(module: Any, cache: Any, device_type: str) -> torch.dtype | None:
    """The dtype that attention rounds its inputs to, if they can be rounded earlier; None otherwise. A cache
    must keep the values of the original forward, unless in training, where nothing reads it later."""
    dtype = autocast_dtype(device_type)
    training = module.training and torch.is_grad_enabled()
    rounds = module.config._attn_implementation in _ROUNDING
    return dtype if rounds and (cache is None or training) else None


def attend(
    module: Any,
    known: Attention,
    heads: Sequence[Tensor],
    position_embeddings: Any,
    attention_mask: Any,
    cache: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """The rest of the original forward, without its output projection. Changes `kwargs`."""
    q, k, v = heads
    more = known.update_arguments(kwargs, position_embeddings)
    if cache is not None and not empty_cache.fill(cache, k, v, module.layer_idx):
        k, v = cache.update(k, v, module.layer_idx, **more)
    options = {
        keyword: getattr(getattr(module, holder) if holder else module, name, None)
        for keyword, holder, name in known.passed
    }
    functions, eager = known.names["ALL_ATTENTION_FUNCTIONS"], known.names["eager_attention_forward"]
    name = module.config._attn_implementation
    attend = functions.get(name, eager) if name == "eager" else functions[name]
    dropout = module.attention_dropout if module.training else 0.0
    found: tuple[Tensor, Any] = attend(
        module, q, k, v, attention_mask, dropout=dropout, scaling=module.scaling, **options, **kwargs
    )
    return found


def examine(module: nn.Module, layers: Layers, without: Collection[str] = ()) -> Examination | None:
    """`without`: "qkv" for projections and their rotary embedding, "attention" for the attention function."""
    projects = "qkv" not in without and rule.is_attention(module)
    attends = "attention" not in without and has_choice(module)
    if not projects and not attends:
        return None
    projection_reason = _projections_reason(module, layers) if projects else ""
    if projects and not projection_reason:
        return Examination.of("attention", module, FusedAttention, "", AttentionFacts(attends))
    attention_reason = function_reason(module) if attends else ""
    reason = "" if attends and not attention_reason else projection_reason or attention_reason
    facts = AttentionFacts(attends, projection_reason)
    return Examination.of("attention function of", module, FusedAttentionFunction, reason, facts)


def _projections_reason(module: nn.Module, layers: Layers) -> str:
    if reason := rule.attention(module).reason:
        return reason
    reasons = ((name, _projection_reason(module._modules[name], layers)) for name in PROJECTIONS)
    return next((f"{name}: {reason}" for name, reason in reasons if reason), "")


def _projection_reason(child: Any, layers: Layers) -> str:
    reason = sum_reason(child, layers) if is_lora(child) else ""
    weight = next(child.parameters(), None)
    return reason or ("" if weight is None else device_reason(weight, "rotary"))
