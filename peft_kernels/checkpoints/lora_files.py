"""Adapters of PEFT on disk, LoRA and DoRA, read with suspicion: all of an adapter, or a sentence why not.

The format is PEFT's (`save_pretrained`): `adapter_config.json` says what it is, and
`adapter_model.safetensors` holds `base_model.model.<layer>.lora_A.weight` and the like.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.lora.dora import dora_factors
from ..patch import eligibility as judge
from ..serving.layers import LoraLayer, reason_unserved
from .header import CheckpointError, Entry, read_header, shown
from .json_file import read_json
from .patterns import PatternTable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LARGEST_JSON = 10_000_000
"""Bytes, of the configuration and of the weights' header. Parsed they take many times as many, with the GIL
held meanwhile."""
_LARGEST = torch.finfo(torch.float32).max
"""Of lora_alpha: what kernels scale with is fp32."""
PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Those that leave the base as it is. PiSSA, OLoRA, LoftQ and others change its weights: other adapters could
not share it."""
_BEYOND = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "lora_bias", "use_qalora", "use_bdlora",
)  # fmt: skip
"""What makes an adapter more than LoRA or DoRA over linear layers, or something else."""


def read_lora(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    check_bytes: Callable[[int], None] = lambda nbytes: None,
) -> dict[nn.Module, LoraLayer]:
    """An adapter for the linear layers of a model, which is not changed.

    Parameters
    ----------
    dtype : torch.dtype
        Of the model's activations.
    adapter_dtype : torch.dtype
        What lora_a and lora_b are kept in.
    check_bytes : callable
        Told how many bytes it will take, before any weight is read. What it raises is passed on.

    Raises
    ------
    CheckpointError (a ValueError)
        Files that are missing, damaged, for another model or of a kind that is not served; values that are
        NaN or Inf.
    """
    config = read_config(folder / CONFIG)
    _check_served(config)
    if not os.path.isfile(folder / WEIGHTS):
        raise CheckpointError(f"{folder}: expected a {WEIGHTS}, got none")
    parts = _by_layer(read_header(folder / WEIGHTS, LARGEST_JSON)[0])
    check_bytes(
        sum(
            prod(entry.shape) * (4 if part == "magnitude" else adapter_dtype.itemsize)
            for entries in parts.values()
            for part, entry in entries.items()
        )
    )
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, LoraLayer] = {}
    for path, entries in parts.items():
        layer = _layer(modules, path)
        if layer in found:
            raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected one adapter for the layer, got two")
        found[layer] = _read(layer, path, entries, config, device, dtype, adapter_dtype)
    return found


def read_config(path: Path, otherwise: str = "") -> dict[str, Any]:
    """The configuration of a LoRA adapter, with a PatternTable for each pattern. `otherwise` is what to do
    with an adapter of another kind."""
    config = read_json(path, LARGEST_JSON)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path.name}: expected peft_type 'LORA', got {shown(got)}{otherwise}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path.name}: {name}: expected a table, got {shown(config[name])}")
        try:
            config[name] = PatternTable(config.get(name) or {})
        except ValueError as error:
            raise CheckpointError(f"{path.name}: {name}: {error}") from error
    return config


def check_init(config: dict[str, Any]) -> None:
    """CheckpointError for an adapter whose initialisation has changed its base."""
    init = config.get("init_lora_weights", True)
    if not any(init is one or init == one for one in _INITS) or type(init) is int:
        raise CheckpointError(
            f"{CONFIG}: init_lora_weights: expected one that leaves the base as it is, got {shown(init)} "
            "(save it with path_initial_model_for_weight_conversion)"
        )


def _check_served(config: dict[str, Any]) -> None:
    for name in _BEYOND:
        if config.get(name):
            raise CheckpointError(f"{CONFIG}: {name}: expected none in an adapter to serve, got one")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{CONFIG}: bias: expected 'none', got {shown(config['bias'])}")
    check_init(config)


def _by_layer(entries: dict[str, Entry]) -> dict[str, dict[str, Entry]]:
    layers: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        path, part = next(
            (
                (key[len(PREFIX) : -len(suffix) - 1], part)
                for suffix, part in _PARTS.items()
                if key.startswith(PREFIX) and key.endswith("." + suffix)
            ),
            ("", ""),
        )
        if not part:
            raise CheckpointError(
                f"{WEIGHTS}: {shown(key)}: expected {PREFIX}<layer>.lora_A.weight or another part of "
                "LoRA or DoRA over a linear layer"
            )
        if len(entry.shape) != (1 if part == "magnitude" else 2) or entry.dtype not in DTYPES:
            expected = "a vector" if part == "magnitude" else "a matrix"
            raise CheckpointError(
                f"{WEIGHTS}: {shown(key)}: expected {expected} of fp32, bf16 or fp16, "
                f"got {entry.dtype} of shape {entry.shape}"
            )
        if part in layers.setdefault(path, {}):
            raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected one {part} for the layer, got two")
        layers[path][part] = entry
    if not layers:
        raise CheckpointError(f"{WEIGHTS}: expected an adapter, got no tensors")
    return layers


def _layer(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    layer = modules.get(path)
    if layer is None:
        raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a layer of this model")
    reason = reason_unserved(layer)
    if reason:
        raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a linear layer that is served: {reason}")
    return layer


def _read(
    layer: nn.Module,
    path: str,
    entries: dict[str, Entry],
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> LoraLayer:
    wanted = {"a", "b"} | ({"magnitude"} if config.get("use_dora") else set())
    if set(entries) != wanted:
        expected, got = ", ".join(sorted(wanted)), ", ".join(sorted(entries))
        raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected {expected}, got {got}")
    base = judge.operands(layer, dtype, device)
    if isinstance(base, str):
        raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a linear layer that is served: {base}")
    out_features, in_features = base.weight.shape
    r = entries["a"].shape[0]
    for part, shape in {"a": (r, in_features), "b": (out_features, r), "magnitude": (out_features,)}.items():
        if part in entries and entries[part].shape != shape:
            raise CheckpointError(
                f"{WEIGHTS}: {shown(entries[part].name)}: expected shape {shape}, got {entries[part].shape}"
            )
    scaling = scaling_of(config, path, r)
    a, b = (finite(entries[part], adapter_dtype).to(device) for part in ("a", "b"))
    scale = None
    if "magnitude" in entries:
        x = torch.empty((0, in_features), dtype=base.dtype, device=device)
        magnitude = finite(entries["magnitude"], torch.float32).to(device)
        scale = dora_factors(x, base.weight, a, b, magnitude, scaling, base.compute_dtype)
    return LoraLayer(a, b, scaling, scale)


def scaling_of(config: dict[str, Any], path: str, r: int) -> float:
    rank = _of_pattern(config, "rank_pattern", path, config.get("r"))
    if r < 1:
        raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a rank of at least 1, got {r}")
    if rank != r:
        raise CheckpointError(
            f"{WEIGHTS}: {shown(path)}: expected r={shown(rank)} as {CONFIG} has it, got {r}"
        )
    alpha = _of_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not -_LARGEST <= alpha <= _LARGEST:
        raise CheckpointError(f"{CONFIG}: lora_alpha: expected a number, got {shown(alpha)}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _of_pattern(config: dict[str, Any], name: str, path: str, otherwise: Any) -> Any:
    table: PatternTable = config[name]
    try:
        return table.get(path, otherwise)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: {name}: {error}") from error


def finite(entry: Entry, dtype: torch.dtype) -> Tensor:
    value = entry.read().to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{WEIGHTS}: {shown(entry.name)}: expected finite numbers in {dtype}, got NaN or Inf"
        )
    return value
