"""Batches with a different virtual prompt per row: prompt tuning or P-tuning in one PEFT model.

inputs = pk.prompts.mixed_inputs(model, input_ids, attention_mask, adapter_names=["support", "legal"])
logits = model.get_base_model()(**inputs).logits
tokens = model.get_base_model().generate(**inputs, max_new_tokens=20)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

BASE = "__base__"
"""The name of rows without an adapter, as in PEFT's mixed batches of LoRA."""
IGNORED = -100  # label ignored by the loss
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def mixed_inputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    adapter_names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Inputs of the base model in which each row has the virtual tokens of its adapter before its text.

    Each row's result equals that of its adapter alone, for any lengths: PEFT leaves padding between prompt
    and text; here it is on the left for causal models, and on the right for encoders, which may count
    positions from the first column. The prompts are differentiable.

    Parameters
    ----------
    model : peft.PeftModel
        With adapters of prompt tuning (Lester et al. 2021) or P-tuning (Liu et al. 2021), for a causal or an
        encoder-decoder language model.
    input_ids : Tensor
        (batch, length), int64, padded on either side or not.
    attention_mask : Tensor, optional
        (batch, length), 0 for padding.
    labels : Tensor, optional
        (batch, length) for a causal model. Labels of a decoder are passed through.
    adapter_names : sequence of str, optional
        One per row; "__base__" for a row without virtual tokens. None: the active adapter for all rows.

    Returns
    -------
    dict
        `inputs_embeds` (batch, longest, hidden), in the embeddings' dtype; `attention_mask` (batch, longest);
        `position_ids` for causal models that take them, if rows are padded; `labels` if given. For
        `model.get_base_model()`, its forward and `generate`, which returns only new tokens.

    Raises
    ------
    ValueError
        A shape that does not fit; an unknown adapter, or one of another method or task; rows of different
        lengths for a causal model that supports neither positions nor padding (BART's decoder alone), or with
        transformers before 5.2.
    """
    names = _checked(model, input_ids, attention_mask, adapter_names)
    causal = model.active_peft_config.task_type == "CAUSAL_LM"
    if causal and labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels: expected the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
        )
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    prompts = {name: _prompt(model, name) for name in dict.fromkeys(names)}
    text = model.word_embeddings(input_ids)
    rows, targets = [], []
    for i, name in enumerate(names):
        rows.append(torch.cat((prompts[name].to(text), text[i][kept[i]])))
        if causal and labels is not None:
            targets.append(F.pad(labels[i][kept[i]], (len(prompts[name]), 0), value=IGNORED))
    base = model.get_base_model()
    longest = max(map(len, rows), default=0)
    pads = [(longest - len(row), 0) if causal else (0, longest - len(row)) for row in rows]
    takes_positions = causal and "position_ids" in inspect.signature(base.forward).parameters
    padded = causal and any(map(any, pads))
    if padded and (reason := _one_length_reason(base, takes_positions)):
        raise ValueError(
            f"adapter_names: expected rows of one length, prompt and text, {reason}, "
            f"got lengths {list(map(len, rows))}"
        )
    mask = _padded([input_ids.new_ones(len(row)) for row in rows], pads)
    inputs = {"inputs_embeds": _padded(rows, pads), "attention_mask": mask}
    if padded and takes_positions:  # else they are the model's own
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + _first_position(base)
    if labels is not None:
        inputs["labels"] = _padded(targets, pads, IGNORED) if causal else labels
    return inputs


def _padded(rows: list[Tensor], pads: list[tuple[int, int]], value: int = 0) -> Tensor:
    """Rows (length, ...) as one tensor, each with `value` before and after it."""
    padded = (
        F.pad(row, (0, 0) * (row.dim() - 1) + pad, value=value) for row, pad in zip(rows, pads, strict=True)
    )
    return torch.stack(list(padded))


def _first_position(base: torch.nn.Module) -> int:
    """Index of the first position: RoBERTa and similar models start after the padding token's."""
    embeddings: Any = (m for m in base.modules() if hasattr(m, "create_position_ids_from_inputs_embeds"))
    return next((m.padding_idx + 1 for m in embeddings), 0)


def _one_length_reason(base: torch.nn.Module, takes_positions: bool) -> str:
    """Why rows of different lengths would get wrong positions, or ""."""
    import transformers

    if takes_positions:
        old = TorchVersion(transformers.__version__) < "5.2"
        return "with transformers before 5.2, whose generate() does not advance positions" if old else ""
    ignores_mask = any(
        "PositionalEmbedding" in type(m).__name__
        and "attention_mask" not in inspect.signature(m.forward).parameters
        for m in base.modules()
    )
    counts = f"for {type(base).__name__}, which counts positions from the first column, padding or not"
    return counts if ignores_mask else ""


def _prompt(model: Any, name: str) -> Tensor:
    """The virtual tokens of an adapter, (num_virtual_tokens, hidden)."""
    if name == BASE:
        weight = model.word_embeddings.weight
        return weight.new_empty(0, weight.shape[1])
    encoder, config = model.prompt_encoder[name], model.peft_config[name]
    if config.inference_mode:  # P-tuning saves only the encoder's output
        prompt = encoder.embedding.weight
    else:
        prompt = encoder(model.prompt_tokens[name][None].to(encoder.embedding.weight.device))[0]
    return prompt[: config.num_virtual_tokens]


def _checked(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, adapter_names: Sequence[str] | None
) -> list[str]:
    """The adapter of each row."""
    if not hasattr(model, "prompt_encoder"):
        raise ValueError(
            f"model: expected a PEFT model with prompt tuning or P-tuning, got {type(model).__name__}"
        )
    if input_ids.dim() != 2 or not len(input_ids):
        raise ValueError(f"input_ids: expected a shape (batch, length), got {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    names = [model.active_adapter] * len(input_ids) if adapter_names is None else list(adapter_names)
    if isinstance(adapter_names, str) or len(names) != len(input_ids):
        got = repr(adapter_names) if isinstance(adapter_names, str) else f"{len(names)} of them"
        raise ValueError(f"adapter_names: expected one for each of {len(input_ids)} rows, got {got}")
    for name in dict.fromkeys(name for name in names if name != BASE):
        if name not in model.prompt_encoder:
            there = ", ".join(model.prompt_encoder)
            raise ValueError(f"adapter_names: expected {there} or {BASE}, got {name!r}")
        config = model.peft_config[name]
        for what, value, known in (
            ("method", config.peft_type, _PROMPTS),
            ("task_type", config.task_type, _TASKS),
        ):
            if value not in known:
                raise ValueError(f"adapter {name}: expected {what} {' or '.join(known)}, got {value}")
    return names
