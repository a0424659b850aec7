"""Decoder layers like Llama's: the residual sum between attention and MLP in one op with the norm after it.
Under autocast, norms return the dtype that the projections would round to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...core.wrong_types import an
from ...ops.arguments import autocast_dtype, is_traced
from ...ops.block.rms_norm import add_rms_norm, rms_norm
from ...ops.casts import add_residual
from ..fused import RECORD, Fallback, Fused, computed_by
from ..rules import attention as attention_rule
from ..rules import decoder_layer as rule
from ..rules.calls import ORDINARY, device_reason, hook_reason
from ..rules.decoder_layer import NORM_NAMES
from ..rules.examination import Examination, Layers
from . import prepared_layer
from . import rms_norm as norms
from .attention import FusedAttention, rounds_to
from .gated_mlp import FusedMlp


def _run(layer: Any, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor | Fallback:
    if torch.compiler.is_compiling() or is_traced():  # a compiler fuses the sum and the norm itself
        return Fallback()
    defaults = rule.layer(layer)
    if defaults is None:
        return Fallback("its forward was replaced; restore it to fuse it")
    x = hidden_states
    if not isinstance(x, Tensor) or device_reason(x, "add_rms_norm") or len(args) > len(defaults):
        return Fallback()
    known = dict(defaults)
    if "past_key_values" in kwargs and "past_key_values" not in known:  # its old name
        return Fallback()
    kwargs = known | dict(zip(known, args, strict=False)) | kwargs
    prepared = prepared_layer.run(layer, layer.__dict__[RECORD], x, kwargs)
    if prepared is not None:
        return prepared
    children = layer.__dict__["_modules"]
    first, second = (_norm_operands(children, name, x) for name in NORM_NAMES)
    if isinstance(first, Fallback):
        return first
    if isinstance(second, Fallback):
        return second
    attention, mlp = children["self_attn"], children["mlp"]
    y, _ = attention(hidden_states=_normed(first, _rounds_to(attention, kwargs, x), x), **kwargs)
    if type(y) not in ORDINARY or y.shape != x.shape or y.dtype not in DTYPES:
        x = x + y
        return x + mlp(children[NORM_NAMES[1]](x))
    y, x = _normed(second, _rounds_to(mlp, kwargs, x), y, x)
    y = mlp(y)
    if type(y) in ORDINARY and y.shape == x.shape and y.dtype != x.dtype and y.dtype in DTYPES:
        return add_residual(y, x)  # torch's sum of two dtypes takes twice as long
    return x + y


@computed_by(_run)
class FusedDecoderLayer(Fused):
    """x + attention(norm(x)), then the same with the MLP."""


def _normed(operands: Any, dtype: torch.dtype | None, x: Tensor, *residual: Tensor) -> Any:
    """The norm of x (+ residual), in `dtype` if that rounds once at most."""
    weight, eps, options = operands
    whole = torch.promote_types(x.dtype, residual[0].dtype) if residual else x.dtype
    if whole not in (torch.float32, dtype):
        dtype = None
    call: Any = add_rms_norm if residual else rms_norm
    return call(x, *residual, weight, eps, dtype=dtype, **options)


def _norm_operands(children: dict[str, Any], name: str, x: Tensor) -> Any:
    """The arguments of the norm of that name after x, or why the module must be called."""
    found = norms.operands(children[name], x)
    reason = found.reason if isinstance(found, Fallback) else hook_reason(children[name])
    return Fallback(f"{name}: {reason}") if reason else found


def _rounds_to(half: Any, kwargs: dict[str, Any], x: Tensor) -> torch.dtype | None:
    """The dtype to which attention or MLP rounds its input, if nothing else reads it; None otherwise."""
    if RECORD not in half.__dict__ or hook_reason(half):
        return None
    kind = type(half)
    if issubclass(kind, FusedMlp):
        return autocast_dtype(x.device.type) if half.training and torch.is_grad_enabled() else None
    known = attention_rule.attention(half).computes if issubclass(kind, FusedAttention) else None
    return None if known is None else rounds_to(half, kwargs.get(known.cache), x.device.type)


def examine(module: nn.Module, layers: Layers) -> Examination | None:
    if rule.layer(module) is None:
        above = rule.layer_of_subclass(module)
        reason = f"a subclass of {above} with a forward of its own; nothing to do"
        return Examination.of("decoder layer", module, FusedDecoderLayer, reason) if above else None
    reasons = ((name, _norm_reason(module._modules[name], layers)) for name in NORM_NAMES)
    reason = next((f"{name}: {reason}" for name, reason in reasons if reason), "")
    return Examination.of("decoder layer", module, FusedDecoderLayer, reason)


def _norm_reason(norm: Any, layers: Layers) -> str:
    found = norms.examine(norm, layers)
    if found is None:
        return f"{an(norm)}, which is none of the norms known here; nothing to do"
    return found.reason or device_reason(norm.weight, "add_rms_norm")
