"""FP8 as DeepSeek and Qwen publish it, and transformers writes it: a scale for each block of 128 x 128, or
for a weight."""

from __future__ import annotations

from typing import Any

from .byte_codes import BLOCK, Fp8
from .owner import Config


class FineGrainedFp8(Fp8):
    method, title, variant_key = "fp8", "FP8", "weight_block_size"
    variants = ("blocks",)
    scale = "weight_scale_inv"
    parts = (Fp8.codes, scale)
    marks = (scale,)
    beside = ("activation_scale", "input_scale")
    blocks_alone = True

    def variant_of(self, config: Config) -> str:
        return "blocks" if config.get(self.variant_key, BLOCK) is not None else "whole"

    def check(self, config: Config) -> None:
        blocks = config.get(self.variant_key, BLOCK)
        if blocks is not None and (not isinstance(blocks, (list, tuple)) or list(blocks) != BLOCK):
            raise ValueError(f"weight_block_size: expected {BLOCK} or None, got {blocks!r}")

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        """MiniMax's name for the list, `ignored_layers`, is read where the other is missing."""
        new = dict(config)
        if dense:
            known = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
            new["modules_to_not_convert"] = [*known, *dense]
        return new

    def unused(self, config: Config) -> str:
        return "the quantisation of activations"


class FineGrainedFp8Whole(FineGrainedFp8):
    """With one scale for a weight."""

    variants = ("whole",)
    blocks_alone = False
