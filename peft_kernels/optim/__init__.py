"""What an optimizer needs to know about adapters: LoRA+ parameter groups."""

from __future__ import annotations

from .lora_plus import lora_plus_groups

__all__ = ["lora_plus_groups"]
