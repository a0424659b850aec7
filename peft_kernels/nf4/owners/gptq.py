"""int4 as GPTQModel and AutoGPTQ write it: eight codes of a row in a word, of the transposed matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .int4 import Int4
from .owner import Config, tensor_of

_OTHER_BITS = (2, 3, 8)


class Gptq(Int4):
    """The first version of the format stores words of zero points less 1 in each code. The words were
    subtracted as numbers, so that a borrow may have reached the next code."""

    method, variant_key, variants = "gptq", "checkpoint_format", ("gptq",)
    title = "GPTQ"
    codes, scale, zeros, index = "qweight", "scales", "qzeros", "g_idx"
    parts = marks = (codes, zeros, scale)
    beside = (index,)
    transposed = True
    zero_shift = 0x11111111

    def variant_of(self, config: Config) -> Any:
        found = config.get("checkpoint_format") or config.get("format") or "gptq"
        return found.lower() if isinstance(found, str) else found

    def check(self, config: Config) -> None:
        if config.get("bits") != 4:
            raise ValueError(f"bits: expected 4, for {self.title}, got {config.get('bits')!r}")

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> Any:
        stem = self.stem(weight)
        words, points = tensors.get(self.codes), tensors.get(self.zeros)
        index = tensor_of(tensors, stem, self.index, torch.int32)
        if words is not None and points is not None and words.dim() == points.dim() == 2:
            for bits in _OTHER_BITS:
                if (words.shape[0] * 32, points.shape[1] * 32) == (
                    index.numel() * bits,
                    words.shape[1] * bits,
                ):
                    raise ValueError(
                        f"{stem + self.codes}: expected 4 bits for all layers, got {bits} for this one; "
                        "layers of several widths (`dynamic`) are not loaded"
                    )
        return super().read(tensors, weight)

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        """Readers skip modules that match a key of `dynamic` after `-:`, and those in them: of experts."""
        new = dict(config)
        if dense:
            skipped: dict[str, Any] = {rf"-:^{re.escape(name)}(\.|$)": {} for name in dense}
            new["dynamic"] = {**(config.get("dynamic") or {}), **skipped}
        return new


class GptqV2(Gptq):
    """Zero points as they are."""

    variants = ("gptq_v2",)
    title = "GPTQ v2"
    zero_shift = 0
