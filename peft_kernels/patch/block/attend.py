"""Our attention as an attention function of transformers.

Calls that ours does not cover run "sdpa": position biases, masks that are not spans of keys, a
single query, few products (`small_calls`), devices other than the CPU, and all calls while another function
replaces torch's. Masks are those of "sdpa"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._nn import scaled_dot_product_attention
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...core import dispatch
from ...core.backends import cpu
from ...core.backends.base import DTYPES
from ...ops.arguments import autocast_dtype, is_traced
from ...ops.block.attention import attention
from .. import small_calls
from ..fused import Fallback, record_of
from .attention_function import NAME, REPLACED, is_named, runs_ours

_SDPA = sdpa_attention_forward
"""The entry of transformers' registry that `serve_patched` replaces. Another library's stays."""
_UNSUPPORTED = {"softcap": "caps of scores", "s_aux": "attention sinks", "sinks": "attention sinks"}
"""Arguments that change the result, but that neither ours nor sdpa supports."""


def register() -> None:
    """Registers `attn_implementation="peft_kernels"` with transformers. Changes no model."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def serve_patched() -> None:
    """Lets patched modules whose configuration says "sdpa" run ours. Changes nothing for other modules."""
    if AttentionInterface._global_mapping[REPLACED] is _SDPA:
        AttentionInterface.register(REPLACED, sdpa_or_ours)


def sdpa_or_ours(
    module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", or `attention_forward` for a patched module, unless it is compiled or traced, or
    has few products."""
    ours = (
        not torch.compiler.is_compiling()
        and runs_ours(module)
        and not is_traced()
        and query.numel() * key.shape[2] >= small_calls.FEW_PRODUCTS
    )
    return (attention_forward if ours else _SDPA)(module, query, key, *args, **kwargs)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (batch, heads, rows, features), key and value
    (batch, key_heads, keys, features), a mask that is True where a row attends to a key, or None. Returns
    (batch, rows, heads, features) and None. Selected by name it raises ValueError for arguments that "sdpa"
    would ignore silently."""
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and is_named(module):
            raise ValueError(
                f"{name}: expected None, since neither peft_kernels nor sdpa supports {what}; select another "
                'attention, e.g. model.set_attn_implementation("eager")'
            )
    reason, spans = _unsupported_reason(query, key, value, scaling, kwargs), None
    if reason is None and attention_mask is not None:
        spans = spans_of(attention_mask, query, key)
        reason = "a mask that is not one or two spans of keys a row; nothing to do" if spans is None else None
    if reason is not None:
        record = None if torch.compiler.is_compiling() else record_of(module)
        if record is not None:
            record.count(Fallback(reason and f"attention by sdpa, {reason}"))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal) and attention_mask is None
    q, k, v = _autocast(query, key, value)
    rows = query.shape[2]
    if is_causal and k.shape[2] > rows:  # a static cache, empty after the rows, as in sdpa
        k, v = k[:, :, :rows], v[:, :, :rows]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v, spans, is_causal, scaling, dropout), None


def _autocast(*sides: Tensor) -> tuple[Tensor, ...]:
    """Casts to autocast's dtype, like sdpa: a rotary embedding in fp32 makes queries and keys fp32."""
    dtype = autocast_dtype(sides[0].device.type)
    return sides if dtype is None else tuple(t.to(dtype) for t in sides)


def _unsupported_reason(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> str | None:
    """Why ours does not cover a call, "" where sdpa is as fast; None if it does."""
    if query.device.type != "cpu" or query.shape[2] == 1 or not _has_kernel(query):
        return ""
    if functional.scaled_dot_product_attention is not scaled_dot_product_attention:
        return "torch's function is replaced, as by context_parallel; nothing to do"
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            return what
    if kwargs.get("position_bias") is not None:
        return "position biases; nothing to do"
    if key.shape != value.shape or query.shape[3] != key.shape[3] or query.shape[0] != key.shape[0]:
        return "keys and values of different sizes; nothing to do"
    if not _is_of_one_type(query, key, value):
        return f"queries in {query.dtype}, keys in {key.dtype}; use one dtype"
    return None if scaling is None or scaling > 0 else "a scale that is not positive; nothing to do"


def _is_of_one_type(*sides: Tensor) -> bool:
    """Whether the dtypes are supported and equal, perhaps after autocast."""
    dtypes = {t.dtype for t in sides}
    return dtypes <= set(DTYPES) and (len(dtypes) == 1 or autocast_dtype(sides[0].device.type) is not None)


def _has_kernel(query: Tensor) -> bool:
    """Whether our kernel runs: plain torch would store all scores. A traced call selects its back end
    later."""
    return torch.compiler.is_compiling() or dispatch.select("attention", (query,)).name == "cpu"


def spans_of(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """(batch, rows, 2, 2), int32: up to two spans [first, last) of keys that each row attends to. None for a
    mask that is not bool, differs between heads, or has a row with more spans.

    Not cached between layers: writes through `.data` or numpy could not be detected."""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if (
        mask.dtype != torch.bool
        or mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1:] != (1, rows, keys)
        or not _is_readable(mask)
    ):
        return None
    spans: Tensor | None = cpu.BACKEND.extension.spans_of_mask(mask[:, 0])
    return None if spans is None else spans.expand(batch, rows, 2, 2)


def _is_readable(mask: Tensor) -> bool:
    """Whether the values of a mask can be read: it is not fake, compiled or traced."""
    return (
        type(mask) is Tensor  # not a fake one, as in torch.export
        and not torch.compiler.is_compiling()
        and not is_traced()
        and not torch._C._functorch.is_functorch_wrapped_tensor(mask)
    )
