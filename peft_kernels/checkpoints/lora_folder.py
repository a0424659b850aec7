"""A folder of PEFT's with a LoRA adapter to merge: its configuration and tensors, read with suspicion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .header import CheckpointError, Entry, read_header, shown
from .lora_files import CONFIG, DTYPES, LARGEST_JSON, PREFIX, WEIGHTS, check_init, read_config

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
}
_UNMERGED = {
    "alora_invocation_tokens": "it changes some tokens of a sequence and not others, which no weight does",
    "arrow_config": "it chooses adapters token by token, which no weight does",
    "layer_replication": "its model has layers that the base lacks",
    "trainable_token_indices": "rows of embeddings are not merged here",
    "use_qalora": "QALoRA is not merged here",
    "use_bdlora": "block-diagonal LoRA is not merged here",
    "kasa_config": "KaSA changes the base, too",
    "monteclora_config": "MonteCLoRA is not merged here",
    "velora_config": "VeLoRA is not merged here",
    "megatron_config": "layers of Megatron are not merged here",
}
"""Options of LoraConfig that make an adapter something else, and why it is not merged."""
WITH_PEFT = "; merge it with PEFT's merge_and_unload"
_DIMENSIONS = {"magnitude": 1, "bias": 1}


@dataclass
class LoraFolder:
    """What is in it, by the names that PEFT has."""

    path: Path
    config: dict[str, Any]
    layers: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """By path of the module that PEFT wraps, with `.base_layer` for each wrapper outside of it: the
    tensors `a`, `b`, `magnitude`, `bias`, `embedding_a`, `embedding_b`."""
    plain: dict[str, Entry] = field(default_factory=dict)
    """Tensors that stand for those of the model, by their names in it."""

    @classmethod
    def open(cls, path: Path) -> LoraFolder:
        """CheckpointError for files that are missing or damaged, and for an adapter that cannot be merged."""
        config = read_config(path / CONFIG, WITH_PEFT)
        _check_config(config)
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{path}: expected a {WEIGHTS}, got none; save_pretrained of PEFT writes it"
            )
        found = cls(path, config)
        for key, entry in read_header(path / WEIGHTS, LARGEST_JSON)[0].items():
            found._add(key, entry)
        if not found.layers and not found.plain:
            raise CheckpointError(f"{WEIGHTS}: expected an adapter, got no tensors")
        for layer, parts in found.layers.items():
            found._check(layer, parts)
        return found

    def _add(self, key: str, entry: Entry) -> None:
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected a name that starts with {PREFIX}")
        name = key[len(PREFIX) :]
        suffix = next((suffix for suffix in _PARTS if name.endswith(f".{suffix}")), None)
        if suffix is None:
            if "lora_" in name:
                raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected a part of LoRA or DoRA{WITH_PEFT}")
            self.plain[name.replace(".base_layer.", ".")] = entry
            return
        layer, part = name[: -len(suffix) - 1], _PARTS[suffix]
        parts = self.layers.setdefault(layer, {})
        if part in parts:
            raise CheckpointError(f"{WEIGHTS}: {shown(key)}: expected one {part} for the layer, got two")
        dimensions = _DIMENSIONS.get(part, 2)
        if len(entry.shape) != dimensions or entry.dtype not in DTYPES:
            expected = "a vector" if dimensions == 1 else "a matrix"
            raise CheckpointError(
                f"{WEIGHTS}: {shown(key)}: expected {expected} of fp32, bf16 or fp16, "
                f"got {entry.dtype} of shape {entry.shape}"
            )
        parts[part] = entry

    def _check(self, layer: str, parts: dict[str, Entry]) -> None:
        dora, biases = bool(self.config.get("use_dora")), bool(self.config.get("lora_bias"))
        pair = {"embedding_a", "embedding_b"} if "embedding_a" in parts else {"a", "b"}
        wanted = pair | ({"magnitude"} if dora else set()) | ({"bias"} if biases and "a" in pair else set())
        if set(parts) != wanted:
            expected, got = ", ".join(sorted(wanted)), ", ".join(sorted(parts))
            raise CheckpointError(f"{WEIGHTS}: {shown(layer)}: expected {expected}, got {got}")


def _check_config(config: dict[str, Any]) -> None:
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        value = config.get(name)
        is_pattern = name == "target_modules" and isinstance(value, str)
        are_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is not None and not is_pattern and not are_names:
            raise CheckpointError(f"{CONFIG}: {name}: expected a list of names, got {shown(value)}")
    for name, why in _UNMERGED.items():
        if config.get(name):
            raise CheckpointError(f"{CONFIG}: {name}: expected none in an adapter to merge: {why}{WITH_PEFT}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(
            f"{CONFIG}: bias: expected 'none', 'all' or 'lora_only', got {shown(config['bias'])}"
        )
    check_init(config)
