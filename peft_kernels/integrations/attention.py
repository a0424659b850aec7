"""Our attention in transformers models, through transformers' registry of attention functions.

use(model)                             # model.set_attn_implementation("sdpa") undoes it

register()                             # or by name
AutoModelForCausalLM.from_pretrained(..., attn_implementation="peft_kernels")

Masks are those of "sdpa". Calls that ours does not cover fall back to "sdpa": dropout, position biases, masks
that are not spans of keys, a single query, devices other than the CPU. Sinks and softcaps raise, because
"sdpa" would ignore them silently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..core import dispatch
from ..core.backends import cpu
from ..ops.arguments import autocast_dtype, is_traced
from ..ops.block.attention import attention

NAME = "peft_kernels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNSUPPORTED = {"softcap": "caps of scores", "s_aux": "attention sinks", "sinks": "attention sinks"}
"""Arguments that change the result, but that neither ours nor sdpa supports."""


def register() -> None:
    """Registers `attn_implementation="peft_kernels"` with transformers. Changes no model."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: nn.Module) -> None:
    """Makes a transformers model, or all models that a module wraps (PEFT), use our attention.

    Raises
    ------
    TypeError
        It contains no transformers model.
    ValueError
        Its class does not use transformers' registry, or computes something else than "sdpa" (sinks of
        GPT-OSS, softcap of Gemma 2). Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got a {type(model).__name__}")
    found = _models(model)
    if not found:
        raise TypeError(f"model: expected a model of transformers, got a {type(model).__name__} without one")
    for one in found:
        if not one._can_set_attn_implementation():
            raise ValueError(f"model: a {type(one).__name__} does not let its attention be chosen")
        for part in one.modules():
            if isinstance(part, PreTrainedModel) and not _is_sdpas(part):
                raise ValueError(
                    'model: expected one that supports "sdpa", which ours replaces, '
                    f"got a {type(part).__name__}, which does not"
                )
    register()
    for one in found:
        one.set_attn_implementation(NAME)


def _models(module: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models in a module."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [one for child in module.children() for one in _models(child)]


def _is_sdpas(model: PreTrainedModel) -> bool:
    """Whether a model supports "sdpa", if its attention can be selected at all."""
    return bool(model._supports_sdpa) or not model._can_set_attn_implementation()


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
    (batch, rows, heads, features) and None. Raises ValueError for unsupported arguments."""
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, since neither peft_kernels nor sdpa supports {what}; select another "
                'attention, e.g. model.set_attn_implementation("eager")'
            )
    if _takes(query, key, value, dropout, scaling, kwargs):
        spans = None if attention_mask is None else spans_of(attention_mask, query, key)
        if attention_mask is None or spans is not None:
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            is_causal = bool(is_causal) and attention_mask is None
            q, k, v = _autocast(query, key, value)
            rows = query.shape[2]
            if is_causal and k.shape[2] > rows:  # a static cache, empty after the rows, as in sdpa
                k, v = k[:, :, :rows], v[:, :, :rows]
            return attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), spans, is_causal, scaling
            ), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


def _autocast(*sides: Tensor) -> tuple[Tensor, ...]:
    """Casts to autocast's dtype, like sdpa: a rotary embedding in fp32 makes queries and keys fp32."""
    dtype = autocast_dtype(sides[0].device.type)
    return sides if dtype is None else tuple(t.to(dtype) for t in sides)


def _takes(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, kwargs: dict[str, Any]
) -> bool:
    return (
        query.device.type == "cpu"
        and query.shape[2] > 1
        and query.shape[3] == key.shape[3]
        and query.shape[0] == key.shape[0]
        and key.shape == value.shape
        and _is_of_one_type(query, key, value)
        and not dropout
        and (scaling is None or scaling > 0)
        and kwargs.get("position_bias") is None
        and _has_kernel(query)
    )


def _is_of_one_type(*sides: Tensor) -> bool:
    """Whether the dtypes are supported and equal, perhaps after autocast."""
    dtypes = {t.dtype for t in sides}
    return dtypes <= set(_DTYPES) and (len(dtypes) == 1 or autocast_dtype(sides[0].device.type) is not None)


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
