"""A model's sizes from its configuration alone: transformers builds it on the meta device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.header import CheckpointError
from ..targets import choose_layers
from .memory import Block, Linear, Model

CHECKED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose activations are held to measured ones."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PIECES = {("self_attn", name) for name in PROJECTIONS[:4]} | {("mlp", name) for name in PROJECTIONS[4:]}


def build(path: Path) -> Any:
    """The model of a folder or config.json, with neither weights nor memory. CheckpointError says why not."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("transformers is not installed: pip install 'peft_kernels[hf]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)  # of the model as it was before
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers raises on a configuration that it does not know
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: expected the configuration of a language model ({reason})") from error


def describe(model: Any, dtype: torch.dtype | None = None, targets: Sequence[str] | None = None) -> Model:
    """Parameters
    ----------
    model : PreTrainedModel
        On any device.
    dtype : torch.dtype, optional
        Of the weights; by default the configuration's, else bfloat16.
    targets : names, optional
        Last parts of the names of layers that get adapters; by default all linear layers but the head.
    """
    quantised, _ = choose_layers(model)
    head = model.get_output_embeddings()
    linears = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        shape = tuple(module.weight.shape)
        out, into = shape if isinstance(module, nn.Linear) else shape[::-1]
        last = name.rpartition(".")[2]
        adapted = module is not head if targets is None else last in targets
        linears.append(Linear(name, out, into, name in quantised, adapted))
    if targets is not None:
        missing = sorted(set(targets) - {linear.name.rpartition(".")[2] for linear in linears})
        if missing:
            raise CheckpointError(f"target-modules: expected names of linear layers, got {missing[0]!r}")
    dtype = dtype or getattr(model.config, "dtype", None) or torch.bfloat16
    config = model.config.get_text_config()
    return Model(
        tuple(linears),
        tuple(tuple(parameter.shape) for parameter in model.parameters()),
        dtype.itemsize,
        config.vocab_size,
        config.num_hidden_layers,
        _block(model, config, linears),
    )


def _block(model: Any, config: Any, linears: list[Linear]) -> Block | None:
    """The decoder layer, if all are alike and have the parts of Llama's and no others."""
    by_layer: dict[str, dict[str, Linear]] = {}
    for linear in linears:
        match = re.fullmatch(r".*\.layers\.(\d+)\.(\w+)\.(\w+)", linear.name)
        if match and (match[2], match[3]) in _PIECES:
            by_layer.setdefault(match[1], {})[match[3]] = linear
        elif ".layers." in linear.name:
            return None
    sizes = {tuple((n, x.out_features, x.in_features, x.adapted) for n, x in sorted(parts.items()))
             for parts in by_layer.values()}  # fmt: skip
    if len(sizes) != 1 or len(by_layer) != config.num_hidden_layers:
        return None
    parts = next(iter(by_layer.values()))
    if set(parts) != set(PROJECTIONS):
        return None
    norms = {name.rpartition(".")[2] for name, _ in model.named_modules() if ".layers.0." in name}
    return Block(
        hidden=parts["q_proj"].in_features,
        intermediate=parts["gate_proj"].out_features,
        q=parts["q_proj"].out_features,
        kv=parts["k_proj"].out_features,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        qk_norm="q_norm" in norms,
        adapted=frozenset(name for name, linear in parts.items() if linear.adapted),
    )
