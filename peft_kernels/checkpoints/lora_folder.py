"""A PEFT folder with a LoRA or DoRA adapter: reads and checks its configuration and tensors.

`save_pretrained` writes the settings to `adapter_config.json` and the tensors to `adapter_model.safetensors`,
as `base_model.model.<layer>.lora_A.weight` and so on. The files are treated as untrusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .header import CheckpointError, Entry, read_header, shown
from .json_file import read_json
from .patterns import PatternTable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MAX_JSON_BYTES = 10_000_000
"""Limit for the configuration and for the header of the weights. Parsing needs several times as much memory
and holds the GIL."""
_MAX_ALPHA = torch.finfo(torch.float32).max  # kernels take the scaling in fp32
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
}
_DIMENSIONS = {"magnitude": 1, "bias": 1}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights unchanged. PiSSA, OLoRA, LoftQ and others modify them, so other
adapters could not share the base."""


@dataclass
class LoraFolder:
    """The configuration and the tensors of an adapter, by PEFT's names."""

    path: Path
    config: dict[str, Any]
    layers: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """The tensors `a`, `b`, `magnitude`, `bias`, `embedding_a` and `embedding_b` of each module that PEFT
    wraps, by the module's path. The path has a `.base_layer` for each wrapper outside of it."""
    plain: dict[str, Entry] = field(default_factory=dict)
    """Tensors that replace tensors of the model, by their names in the model."""

    @classmethod
    def open(cls, path: Path, check_config: Callable[[dict[str, Any]], None], hint: str = "") -> LoraFolder:
        """Reads the configuration and the header of the weights.

        Parameters
        ----------
        check_config : callable
            Called with the configuration before the weights are opened; raises for unsupported options.
        hint : str
            Appended to errors about adapters of another kind: what to do with them instead.

        Raises
        ------
        CheckpointError
            Missing or damaged files, or an adapter that is not LoRA or DoRA.
        """
        config = read_config(path / CONFIG, hint)
        check_config(config)
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(f"{path}: expected {WEIGHTS}, got none; save_pretrained of PEFT writes it")
        found = cls(path, config)
        for key, entry in read_header(path / WEIGHTS, _MAX_JSON_BYTES)[0].items():
            found._add(key, entry, hint)
        if not found.layers and not found.plain:
            raise CheckpointError(f"{WEIGHTS}: expected an adapter, got no tensors")
        for layer, parts in found.layers.items():
            found._check_complete(layer, parts)
        return found

    def _add(self, key: str, entry: Entry, hint: str) -> None:
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected a name that starts with {_PREFIX}")
        name = key[len(_PREFIX) :]
        suffix = next((suffix for suffix in _PARTS if name.endswith(f".{suffix}")), None)
        if suffix is None:
            if "lora_" in name:
                raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected a part of LoRA or DoRA{hint}")
            self.plain[name.replace(".base_layer.", ".")] = entry
            return
        layer, part = name[: -len(suffix) - 1], _PARTS[suffix]
        parts = self.layers.setdefault(layer, {})
        if part in parts:
            raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected one {part} for the layer, got two")
        dimensions = _DIMENSIONS.get(part, 2)
        if len(entry.shape) != dimensions or entry.dtype not in _DTYPES:
            expected = "a vector" if dimensions == 1 else "a matrix"
            raise CheckpointError(
                f"{WEIGHTS}: {shown(key)}: expected {expected} of fp32, bf16 or fp16, "
                f"got {entry.dtype} of shape {entry.shape}"
            )
        parts[part] = entry

    def _check_complete(self, layer: str, parts: dict[str, Entry]) -> None:
        dora, biases = bool(self.config.get("use_dora")), bool(self.config.get("lora_bias"))
        pair = {"embedding_a", "embedding_b"} if "embedding_a" in parts else {"a", "b"}
        wanted = pair | ({"magnitude"} if dora else set()) | ({"bias"} if biases and "a" in pair else set())
        if set(parts) != wanted:
            expected, got = ", ".join(sorted(wanted)), ", ".join(sorted(parts))
            raise CheckpointError(f"{WEIGHTS}: {shown(layer)}: expected {expected}, got {got}")


def read_config(path: Path, hint: str = "") -> dict[str, Any]:
    """The configuration of a LoRA adapter, its rank and alpha patterns parsed to PatternTables."""
    config = read_json(path, _MAX_JSON_BYTES)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path.name}: expected peft_type 'LORA', got {shown(got)}{hint}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path.name}: {name}: expected a table, got {shown(config[name])}")
        try:
            config[name] = PatternTable(config.get(name) or {})
        except ValueError as error:
            raise CheckpointError(f"{path.name}: {name}: {error}") from error
    return config


def check_init(config: dict[str, Any]) -> None:
    """Raises CheckpointError for an adapter whose initialisation changed its base."""
    init = config.get("init_lora_weights", True)
    if not any(init is one or init == one for one in _INITS) or type(init) is int:
        raise CheckpointError(
            f"{CONFIG}: init_lora_weights: expected one that leaves the base as it is, got {shown(init)} "
            "(save it with path_initial_model_for_weight_conversion)"
        )


def scaling_of(config: dict[str, Any], path: str, r: int) -> float:
    """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA, of a layer whose tensors have rank `r`."""
    rank = _pattern_value(config, "rank_pattern", path, config.get("r"))
    if r < 1:
        raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a rank of at least 1, got {r}")
    if rank != r:
        raise CheckpointError(
            f"{WEIGHTS}: {shown(path)}: expected r={shown(rank)} as {CONFIG} has it, got {r}"
        )
    alpha = _pattern_value(config, "alpha_pattern", path, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not -_MAX_ALPHA <= alpha <= _MAX_ALPHA:
        raise CheckpointError(f"{CONFIG}: lora_alpha: expected a number, got {shown(alpha)}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _pattern_value(config: dict[str, Any], name: str, path: str, default: Any) -> Any:
    table: PatternTable = config[name]
    try:
        return table.get(path, default)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: {name}: {error}") from error


def read_finite(entry: Entry, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. Raises CheckpointError if it has NaN or Inf there."""
    value = entry.read().to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{WEIGHTS}: {shown(entry.name)}: expected finite numbers in {dtype}, got NaN or Inf"
        )
    return value
