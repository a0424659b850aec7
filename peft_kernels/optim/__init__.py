"""What an optimizer needs to know about adapters: LoRA+ parameter groups."""

from __future__ import annotations

from ..ops import adamw as _adamw  # noqa: F401
from .lora_plus import lora_plus_groups

__all__ = ["lora_plus_groups"]
