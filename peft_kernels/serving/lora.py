"""Reads a PEFT folder into the adapter matrices of a model's linear layers. The model is not changed."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.header import CheckpointError, Entry, shown
from ..checkpoints.lora_folder import CONFIG, WEIGHTS, LoraFolder, check_init, read_finite, scaling_of
from ..ops.lora.dora import dora_factors
from ..patch.fused import Fallback
from ..patch.input_spec import input_spec
from ..patch.rules.linear import fused_operands
from .layers import LoraLayer, reason_unserved

_UNSERVED = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "lora_bias", "use_qalora", "use_bdlora",
)  # fmt: skip
"""Options of LoraConfig with which an adapter is more than LoRA or DoRA on linear layers."""


def read_lora(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    check_bytes: Callable[[int], None] = lambda nbytes: None,
) -> dict[nn.Module, LoraLayer]:
    """The adapter of each linear layer.

    Parameters
    ----------
    dtype : torch.dtype
        Dtype of the model's activations.
    adapter_dtype : torch.dtype
        Dtype of lora_a and lora_b in memory.
    check_bytes : callable
        Called with the adapter's size in bytes before any weight is read; may raise.

    Raises
    ------
    CheckpointError (a ValueError)
        Files that are missing, damaged or for another model; an unsupported adapter; NaN or Inf.
    """
    lora = LoraFolder.open(folder, _check_config)
    for entry in (*lora.plain.values(), *_embeddings(lora)):
        raise CheckpointError(
            f"{WEIGHTS}: {shown(entry.name)}: expected a part of LoRA or DoRA over a linear layer"
        )
    check_bytes(
        sum(
            prod(entry.shape) * (4 if part == "magnitude" else adapter_dtype.itemsize)
            for parts in lora.layers.values()
            for part, entry in parts.items()
        )
    )
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, LoraLayer] = {}
    for path, parts in lora.layers.items():
        layer = modules.get(path)
        if layer is None:
            raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a layer of this model")
        if layer in found:
            raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected one adapter for the layer, got two")
        found[layer] = _read_layer(layer, path, parts, lora.config, device, dtype, adapter_dtype)
    return found


def _check_config(config: dict[str, Any]) -> None:
    for name in _UNSERVED:
        if config.get(name):
            raise CheckpointError(f"{CONFIG}: {name}: expected none in an adapter to serve, got one")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{CONFIG}: bias: expected 'none', got {shown(config['bias'])}")
    check_init(config)


def _embeddings(lora: LoraFolder) -> list[Entry]:
    return [parts["embedding_a"] for parts in lora.layers.values() if "embedding_a" in parts]


def _read_layer(
    layer: nn.Module,
    path: str,
    parts: dict[str, Entry],
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> LoraLayer:
    unserved = reason_unserved(layer)
    base = Fallback(unserved) if unserved else fused_operands(layer, input_spec(dtype, device))
    if isinstance(base, Fallback):
        raise CheckpointError(
            f"{WEIGHTS}: {shown(path)}: expected a linear layer that is served: {base.reason}"
        )
    out_features, in_features = base.weight.shape
    r = parts["a"].shape[0]
    for part, shape in {"a": (r, in_features), "b": (out_features, r), "magnitude": (out_features,)}.items():
        if part in parts and parts[part].shape != shape:
            raise CheckpointError(
                f"{WEIGHTS}: {shown(parts[part].name)}: expected shape {shape}, got {parts[part].shape}"
            )
    scaling = scaling_of(config, path, r)
    a, b = (read_finite(parts[part], adapter_dtype).to(device) for part in ("a", "b"))
    scale = None
    if "magnitude" in parts:
        x = torch.empty((0, in_features), dtype=base.dtype, device=device)
        magnitude = read_finite(parts["magnitude"], torch.float32).to(device)
        scale = dora_factors(x, base.weight, a, b, magnitude, scaling, base.compute_dtype)
    return LoraLayer(a, b, scaling, scale)
