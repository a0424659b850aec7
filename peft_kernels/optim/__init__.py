"""Optimizers for adapters and for whole models, with moments in 8 bits; and LoRA+ parameter groups."""

from __future__ import annotations

from .adamw import Adam8bit, AdamW8bit, Lion8bit, PagedAdamW, PagedAdamW8bit
from .lora_plus import lora_plus_groups

__all__ = ["Adam8bit", "AdamW8bit", "Lion8bit", "PagedAdamW", "PagedAdamW8bit", "lora_plus_groups"]
