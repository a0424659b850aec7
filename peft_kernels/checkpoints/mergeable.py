"""Which LoRA adapters can be merged into files of a base model."""

from __future__ import annotations

from typing import Any

from .header import CheckpointError, shown
from .lora_folder import CONFIG, check_init

_UNMERGEABLE = {
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
"""Options of LoraConfig with which an adapter cannot be merged, and why."""
WITH_PEFT = "; merge it with PEFT's merge_and_unload"


def check_mergeable(config: dict[str, Any]) -> None:
    """Raises CheckpointError for an adapter that cannot be merged."""
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        value = config.get(name)
        is_pattern = name == "target_modules" and isinstance(value, str)
        are_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is not None and not is_pattern and not are_names:
            raise CheckpointError(f"{CONFIG}: {name}: expected a list of names, got {shown(value)}")
    for name, why in _UNMERGEABLE.items():
        if config.get(name):
            raise CheckpointError(f"{CONFIG}: {name}: expected none in an adapter to merge: {why}{WITH_PEFT}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(
            f"{CONFIG}: bias: expected 'none', 'all' or 'lora_only', got {shown(config['bias'])}"
        )
    check_init(config)
