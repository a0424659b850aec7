"""Attention modules of Llama's kind: the projections of queries, keys and values in one op, their rotary
embedding in another. Attention itself is what the model's configuration names, as before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...ops.arguments import autocast_dtype, is_traced
from ...ops.block.rotary import rotary
from ...ops.lora.multi_lora import AdaptedLinear, multi_lora_linear
from .. import eligibility as judge
from ..fused import RECORD, Fused
from ..lora.forward import FusedLora, prepare
from . import eligibility as judge_block
from . import empty_cache
from .eligibility import ORDINARY, PROJECTIONS, Attention

_ROUNDING = ("eager", "sdpa", "peft_kernels")
"""Attention functions that multiply what autocast has rounded."""


class FusedAttention(Fused):
    """Queries, keys and values from one op, turned by another."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None:
            found = _run(self, *args, **kwargs)
            if not isinstance(found, str):
                return found
            if found:
                record.fallbacks[found] += 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _run(
    module: Any,
    hidden_states: Any = None,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the original forward gives. A str is the reason why that one must run, empty when it is nothing to
    count."""
    if torch.compiler.is_compiling() or is_traced():  # a compiler fuses the embedding with what is around it
        return ""
    about = judge_block.attention(module)
    if isinstance(about, str):
        return about
    x = hidden_states
    if len(args) > 1 or not _takes(module, x, position_embeddings):
        return ""
    cos, sin = position_embeddings
    cache = args[0] if args else kwargs.pop(about.cache, None)
    if "past_key_values" in kwargs:  # by its old name
        return ""
    sides = _projections(module, x)
    if isinstance(sides, str):
        return sides
    values, dtypes = sides
    inside = rounds_to(module, cache)
    if inside is None or about.words.normed:
        values = [t.to(dtype) for t, dtype in zip(values, dtypes, strict=True)]
    q, k, v = (t.view(*x.shape[:-1], -1, module.head_dim) for t in values)
    if about.words.normed:
        q, k = module.q_norm(q), module.k_norm(k)
    if not about.words.rotates or getattr(module, about.words.rotates):
        q, k = rotary(q, k, cos, sin, inside)
    if inside is not None:
        q, k, v = (t.to(inside) for t in (q, k, v))
    y, weights = _attend(module, about, [t.transpose(1, 2) for t in (q, k, v)], attention_mask, cache, kwargs)
    return module.o_proj(y.reshape(*x.shape[:-1], -1).contiguous()), weights


def _takes(module: Any, x: Any, position_embeddings: Any) -> bool:
    """Whether there is a kernel for such a call."""
    if not isinstance(position_embeddings, (tuple, list)) or len(position_embeddings) != 2:
        return False
    cos, sin = position_embeddings
    if any(type(t) not in ORDINARY or t.dtype not in DTYPES or t.dim() != 3 for t in (x, cos, sin)):
        return False
    batch, rows = x.shape[:2]
    return (
        not judge_block.elsewhere(x.device)
        and cos.shape[0] in (1, batch)
        and cos.shape[1:] == (rows, module.head_dim)
        and module.head_dim % 2 == 0
        and (cos.shape, cos.dtype, cos.device) == (sin.shape, sin.dtype, sin.device)
        and cos.device == x.device
        and not (cos.requires_grad or sin.requires_grad)
    )


def _projections(module: Any, x: Tensor) -> tuple[Sequence[Tensor], Sequence[torch.dtype]] | str:
    """Queries, keys and values of x, each in the dtype that it was computed in, and the dtypes that the
    modules would give them. Without adapters, merged or disabled ones too, the modules are called."""
    children = module.__dict__["_modules"]
    layers: list[AdaptedLinear] = []
    bases: list[judge.Base] = []
    adapted = False
    for name in PROJECTIONS if any(judge.is_lora(children[name]) for name in PROJECTIONS) else ():
        prepared = prepare(children[name], x.dtype, x.device)
        if isinstance(prepared, str):
            if prepared:
                return f"{name}: {prepared}"
            adapted = False
            break
        base, adapters = prepared
        adapted = adapted or len(adapters) > 0
        bases.append(base)
        layers.append(AdaptedLinear(base.weight, base.bias, adapters))
    if not adapted:
        values = [children[name](x) for name in PROJECTIONS]
        return values, [t.dtype for t in values]
    compute, dtype = bases[0].compute_dtype, bases[0].dtype
    for name, base in zip(PROJECTIONS, bases, strict=True):
        if (base.compute_dtype, base.dtype) != (compute, dtype):
            return f"{name}: computes in {base.compute_dtype}, {PROJECTIONS[0]} in {compute}"
    if compute == autocast_dtype(x.device.type):  # which rounds what adapters multiply, too
        dtype = compute
    return multi_lora_linear(x.to(dtype), layers, None, compute), [base.out_dtype for base in bases]


def rounds_to(module: Any, cache: Any) -> torch.dtype | None:
    """The dtype that attention rounds its arguments to, if that can be done before: in training nobody goes
    on with a cache, and else it keeps what the original forward would put there."""
    dtype = autocast_dtype("cpu")
    training = module.training and torch.is_grad_enabled()
    rounds = module.config._attn_implementation in _ROUNDING
    return dtype if rounds and (cache is None or training) else None


def _attend(
    module: Any,
    about: Attention,
    sides: Sequence[Tensor],
    attention_mask: Any,
    cache: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """The rest of the original forward, but for its last projection."""
    q, k, v = sides
    if cache is not None and not empty_cache.fill(cache, k, v, module.layer_idx):
        more = {"kwargs": kwargs} if about.cache == "cache" else {}
        k, v = cache.update(k, v, module.layer_idx, **more)
    told = {
        keyword: getattr(getattr(module, holder) if holder else module, name, None)
        for keyword, holder, name in about.words.passed
    }
    functions, eager = about.names["ALL_ATTENTION_FUNCTIONS"], about.names["eager_attention_forward"]
    attend = functions.get_interface(module.config._attn_implementation, eager)
    dropout = module.attention_dropout if module.training else 0.0
    found: tuple[Tensor, Any] = attend(
        module, q, k, v, attention_mask, dropout=dropout, scaling=module.scaling, **told, **kwargs
    )
    return found


def examine(module: nn.Module) -> str | None:
    """Why an attention module would not run fused, or ""; None for a module that is none."""
    if not judge_block.is_attention(module):
        return None
    about = judge_block.attention(module)
    if isinstance(about, str):
        return about
    for name in PROJECTIONS:
        child: Any = module._modules[name]
        reason = ""
        if judge.is_lora(child):
            reason = judge.lora_class(child, FusedLora)
            if not reason:  # another class keeps its adapters elsewhere
                active = judge.active(child)
                reason = judge.lora(child, active, FusedLora) or judge.summed(child, active)
        weight = next(child.parameters(), None)
        reason = reason or (judge_block.elsewhere(weight.device) if weight is not None else "")
        if reason:
            return f"{name}: {reason}"
    return ""
