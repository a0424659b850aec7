"""Our attention in models of transformers, by their own registry of attention functions.

use(model)                             # and model.set_attn_implementation("sdpa") takes it out again

register()                             # or by name, from the start
AutoModelForCausalLM.from_pretrained(..., attn_implementation="peft_kernels")

Masks are those of "sdpa". What ours does not cover goes to "sdpa" itself: dropout, biases of positions,
masks that are not spans of keys, a single query, other devices than the CPU. What neither computes, sinks
and caps of scores, is refused: "sdpa" would leave it out without a word.
"""

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
_NEITHER = {"softcap": "caps of scores", "s_aux": "attention sinks", "sinks": "attention sinks"}
"""Arguments that change what attention is, and that neither ours nor sdpa looks at."""


def register() -> None:
    """Make `attn_implementation="peft_kernels"` known to transformers. Changes no model."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: nn.Module) -> None:
    """Let a model of transformers compute its attention by our kernel, or all that a module wraps, as PEFT's
    models do.

    Raises
    ------
    TypeError
        There is no model of transformers in it.
    ValueError
        Its class does not choose its attention by transformers' registry, or what it computes is not what
        "sdpa" does (sinks of GPT-OSS, capped scores of Gemma 2). Nothing is changed then.
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
                    'model: expected one that can compute its attention by "sdpa", for ours is the same, '
                    f"got a {type(part).__name__}, which transformers says cannot"
                )
    register()
    for one in found:
        one.set_attn_implementation(NAME)


def _models(module: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module, without those that are parts of another."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [one for child in module.children() for one in _models(child)]


def _is_sdpas(model: PreTrainedModel) -> bool:
    """Whether "sdpa" is what a model computes, where its attention is chosen at all."""
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
    """As transformers calls attention functions: query (batch, heads, rows, features), key and value
    (batch, key_heads, keys, features), a mask that is True where a row attends to a key, or None. Gives
    (batch, rows, heads, features), and no weights. ValueError for what neither ours nor sdpa computes."""
    for name, what in _NEITHER.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, for neither peft_kernels nor sdpa computes {what}; choose another "
                'attention, as by model.set_attn_implementation("eager")'
            )
    if _takes(query, key, value, dropout, scaling, kwargs):
        spans = None if attention_mask is None else spans_of(attention_mask, query, key)
        if attention_mask is None or spans is not None:
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            is_causal = bool(is_causal) and attention_mask is None
            q, k, v = _as_multiplied(query, key, value)
            rows = query.shape[2]
            if is_causal and k.shape[2] > rows:  # a cache that is still empty behind the rows, as in sdpa
                k, v = k[:, :, :rows], v[:, :, :rows]
            return attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), spans, is_causal, scaling
            ), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


def _as_multiplied(*sides: Tensor) -> tuple[Tensor, ...]:
    """Autocast rounds what sdpa is given: a rotary embedding in fp32 has widened queries and keys."""
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
    """As it is, or by autocast, which rounds all three."""
    dtypes = {t.dtype for t in sides}
    return dtypes <= set(_DTYPES) and (len(dtypes) == 1 or autocast_dtype(sides[0].device.type) is not None)


def _has_kernel(query: Tensor) -> bool:
    """Plain torch would have all scores in memory. A traced call finds its back end when it runs."""
    return torch.compiler.is_compiling() or dispatch.select("attention", (query,)).name == "cpu"


def spans_of(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """(batch, rows, 2, 2), int32: the two spans of keys that each row attends to, each from its first key to
    the one behind its last. None for a mask that is not of bool, differs between heads, or has a row with
    more spans.

    Each layer looks at its mask anew: no cache could tell that it was written through `.data` or numpy."""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if (
        mask.dtype != torch.bool
        or mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1:] != (1, rows, keys)
        or not _is_there(mask)
    ):
        return None
    spans: Tensor | None = cpu.BACKEND.extension.spans_of_mask(mask[:, 0])
    return None if spans is None else spans.expand(batch, rows, 2, 2)


def _is_there(mask: Tensor) -> bool:
    """Whether a mask can be looked at, and what is found holds for this call alone."""
    return (
        type(mask) is Tensor  # no fake one, as of torch.export
        and not torch.compiler.is_compiling()
        and not is_traced()
        and not torch._C._functorch.is_functorch_wrapped_tensor(mask)
    )
