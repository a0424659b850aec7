"""Decoder layers of Llama's kind: the sum between attention and MLP in one op with the norm behind it. Under
autocast, norms give what the projections would round it to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...ops.arguments import autocast_dtype
from ...ops.block.rms_norm import add_rms_norm, rms_norm
from ...ops.casts import add_residual
from .. import eligibility as judge
from ..fused import RECORD, Fused
from . import eligibility as judge_block
from . import rms_norm as norms
from .attention import FusedAttention, rounds_to
from .gated_mlp import FusedMlp


class FusedDecoderLayer(Fused):
    """x + attention(norm(x)), then the same of the MLP."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None:
            found = _run(self, *args, **kwargs)
            if isinstance(found, Tensor):
                return found
            if found:
                record.fallbacks[found] += 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _run(layer: Any, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor | str:
    """A str is the reason why the original forward must run, empty when that is nothing to count."""
    if torch.compiler.is_compiling():  # a compiler fuses what is between the halves
        return ""
    defaults = judge_block.layer(layer)
    if defaults is None:
        return "its forward was replaced"
    x = hidden_states
    if not isinstance(x, Tensor) or judge_block.elsewhere(x.device) or len(args) > len(defaults):
        return ""
    names = [name for name, _ in defaults]
    if "past_key_values" in kwargs and "past_key_values" not in names:  # by its old name
        return ""
    children = layer.__dict__["_modules"]
    first, second = (_norm(children, name, x) for name in judge_block.NORM_NAMES)
    if isinstance(first, str):
        return first
    if isinstance(second, str):
        return second
    kwargs = dict(defaults) | dict(zip(names, args, strict=False)) | kwargs
    attention, mlp = children["self_attn"], children["mlp"]
    y, _ = attention(hidden_states=_normed(first, _read_as(attention, kwargs), x), **kwargs)
    if type(y) not in judge_block.ORDINARY or y.shape != x.shape or y.dtype not in DTYPES:
        x = x + y
        return x + mlp(children[judge_block.NORM_NAMES[1]](x))
    y, x = _normed(second, _read_as(mlp, kwargs), y, x)
    y = mlp(y)
    if type(y) in judge_block.ORDINARY and y.shape == x.shape and y.dtype != x.dtype and y.dtype in DTYPES:
        return add_residual(y, x)  # torch's sum of two dtypes takes twice as long
    return x + y


def _normed(operands: Any, dtype: torch.dtype | None, x: Tensor, *residual: Tensor) -> Any:
    """In that dtype, where it is wanted and loses nothing that would not be lost anyway."""
    weight, eps, how = operands
    whole = torch.promote_types(x.dtype, residual[0].dtype) if residual else x.dtype
    if whole not in (torch.float32, dtype):
        dtype = None
    call: Any = add_rms_norm if residual else rms_norm
    return call(x, *residual, weight, eps, dtype=dtype, **how)


def _norm(children: dict[str, Any], name: str, x: Tensor) -> Any:
    """What the norm of that name computes with, or why it must be called."""
    found = norms.operands(children[name], x)
    reason = found if isinstance(found, str) else judge.call_of(children[name])
    return found if reason is None else f"{name}: {reason}"


def _read_as(half: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that all rounds to which reads what `half` is given, if nobody else sees it."""
    if RECORD not in half.__dict__ or judge.call_of(half) is not None:
        return None
    kind = type(half)
    if issubclass(kind, FusedMlp):
        return autocast_dtype("cpu") if half.training and torch.is_grad_enabled() else None
    about = judge_block.attention(half) if issubclass(kind, FusedAttention) else ""
    return None if isinstance(about, str) else rounds_to(half, kwargs.get(about.cache))


def examine(module: nn.Module) -> str | None:
    """Why a decoder layer would not run fused, or ""; None for a module that is none."""
    if judge_block.layer(module) is None:
        return None
    for name in judge_block.NORM_NAMES:
        norm: Any = module._modules[name]
        reason = norms.examine(norm)
        if reason is None:
            reason = f"a {type(norm).__name__}, which is none of the norms known here"
        if reason:
            return f"{name}: {reason}"
    return ""
