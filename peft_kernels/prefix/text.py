"""Initialises a prefix from text: the base model's keys and values of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from .adapter import adapter_of


@torch.no_grad()
def init_from_text(
    model: Any, tokenizer: Any, text: str | Sequence[Mapping[str, Any]], adapter_name: str | None = None
) -> None:
    """Initialises a plain prefix from text. The model then answers like the base model after that text.

    Tokens are repeated or truncated to num_virtual_tokens, like in PEFT's prompt tuning; the base model runs
    on them once, and its keys and values are copied to the adapter.

    Parameters
    ----------
    model : peft.PeftModel
        A decoder-only model with prefix tuning.
    tokenizer : transformers tokenizer
        The model's own.
    text : str or messages
        A string is tokenised with the tokenizer's special tokens; messages ({"role": ..., "content": ...})
        use its chat template.
    adapter_name : str, optional
        None: the active adapter.

    Raises
    ------
    TypeError
        `model` is not a PeftModel.
    ValueError
        No such adapter; one with `prefix_projection=True`, whose MLP cannot be inverted; an encoder-decoder,
        or a model without keys and values; text without tokens; layers of different shapes, or with a sliding
        window shorter than the prefix. Nothing is changed.
    """
    try:
        from peft import initialize_kv_prefix_from_past_key_values
    except ImportError:
        raise ImportError(f"peft: expected 0.19 or later, got {version('peft')}") from None

    adapter = adapter_of(model, adapter_name)
    if adapter.config.prefix_projection:
        raise ValueError(
            f"adapter_name: expected a plain prefix, got {adapter.name} with prefix_projection=True, whose "
            "MLP has no inverse; fold() it, or initialise without a projection"
        )
    base = model.get_base_model()
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"model: expected a decoder-only model, got {type(base).__name__}: its decoder's output "
            "depends on the encoder's input"
        )
    ids = _ids(tokenizer, text, adapter.config.num_virtual_tokens)
    modes = [(module, module.training) for module in base.modules()]
    base.eval()  # no dropout
    try:
        device = base.get_input_embeddings().weight.device
        outputs = base(input_ids=torch.tensor([ids], device=device), use_cache=True)
    finally:
        for module, mode in modes:
            module.training = mode
    cache = next((outputs[name] for name in ("cache", "past_key_values") if name in outputs), None)
    if cache is None:
        raise ValueError(f"model: expected one that returns its keys and values, got {type(base).__name__}")
    initialize_kv_prefix_from_past_key_values(model, adapter_name=adapter.name, past_key_values=cache)


def _ids(tokenizer: Any, text: str | Sequence[Mapping[str, Any]], count: int) -> list[int]:
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(list(text), tokenize=True, return_dict=False)
    if not ids:
        raise ValueError(f"text: expected one that has tokens, got {text!r}")
    return (list(ids) * (count // len(ids) + 1))[:count]
