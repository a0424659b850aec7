"""int4 and int8 as GPTQModel and AutoGPTQ write them: codes of a row in a word, of the transposed matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.formats import FORMATS
from ...core.packed_state import PackedState
from .byte_codes import ByteCodes
from .int4 import Int4, check_order
from .owner import Config, Owner, expect_shape, tensor_of

_BITS = (2, 3, 4, 8)


class _Gptq(Owner):
    """The first version of the format stores words of zero points less 1 in each code. The words were
    subtracted as numbers, so that a borrow may have reached the next code."""

    method, variant_key = "gptq", "checkpoint_format"
    codes, zeros, index = "qweight", "qzeros", "g_idx"
    beside: ClassVar[tuple[str, ...]] = (index,)

    def variant_of(self, config: Config) -> Any:
        found = config.get("checkpoint_format") or config.get("format") or "gptq"
        if not isinstance(found, str):
            return found
        return f"{found.lower()} in 8 bits" if config.get("bits") == 8 else found.lower()

    def check(self, config: Config) -> None:
        if config.get("bits") not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, for {self.title}, got {config.get('bits')!r}")

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        stem, ours = self.stem(weight), FORMATS[self.format].bits
        words, points = tensors.get(self.codes), tensors.get(self.zeros)
        index = tensor_of(tensors, stem, self.index, torch.int32)
        if words is not None and points is not None and words.dim() == points.dim() == 2:
            shape = words.shape[0] * 32, points.shape[1] * 32
            for bits in _BITS:
                if bits != ours and shape == (index.numel() * bits, words.shape[1] * bits):
                    raise ValueError(
                        f"{stem + self.codes}: expected {ours} bits for all layers, got {bits} for this one; "
                        "layers of several widths (`dynamic`) are not loaded"
                    )
        return super().read(tensors, weight)  # type: ignore[safe-super]

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        """Readers skip modules that match a key of `dynamic` after `-:`, and those in them: of experts."""
        new = dict(config)
        if dense:
            skipped: dict[str, Any] = {rf"-:^{re.escape(name)}(\.|$)": {} for name in dense}
            new["dynamic"] = {**(config.get("dynamic") or {}), **skipped}
        return new


class Gptq(_Gptq, Int4):
    title, variants = "GPTQ", ("gptq",)
    scale = "scales"
    parts = marks = (_Gptq.codes, _Gptq.zeros, scale)
    transposed = True
    zero_shift = 0x11111111


class GptqV2(Gptq):
    """Zero points as they are."""

    title, variants = "GPTQ v2", ("gptq_v2",)
    zero_shift = 0


class GptqInt8(_Gptq, ByteCodes):
    """Four codes of a row in a word, from 0 instead of -128. int8 has no zero points: all have to be 128."""

    format = "int8"
    title, variants = "GPTQ in 8 bits", ("gptq in 8 bits",)
    scale = "scales"
    parts = marks = (_Gptq.codes, _Gptq.zeros, scale)
    zero_words: ClassVar[int] = 0x7F7F7F7F
    """A word of zero points."""

    def check(self, config: Config) -> None:
        if config.get("sym") is False:
            raise ValueError(
                "sym: expected true for GPTQ in 8 bits, since int8 has no zero points, got false"
            )

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        stem = self.stem(weight)
        words = tensor_of(tensors, stem, self.codes, torch.int32)
        scale = tensor_of(tensors, stem, self.scale, torch.float16, torch.bfloat16)
        expect_shape(stem + self.codes, ("in / 4", "out"), words.shape)
        into, out = words.shape[0] * 4, words.shape[1]
        expect_shape(stem + self.scale, ("groups", out), scale.shape)
        groups = scale.shape[0]
        if groups not in (1, *(-(-into // size) for size in FORMATS[self.format].blocksizes if size)):
            raise ValueError(
                f"{stem + self.scale}: expected groups of 64 or 128 input features, or whole rows, got "
                f"{groups} groups of {into}"
            )
        state, aside = super().read({**tensors, self.scale: scale.T.contiguous()}, weight)
        check_order(stem + self.index, tensors[self.index], into, state.blocksize or into)
        zeros = tensor_of(tensors, stem, self.zeros, torch.int32)
        expect_shape(stem + self.zeros, (groups, out // 4), zeros.shape)
        if not zeros.is_meta and (bad := int((zeros != self.zero_words).sum())):
            raise ValueError(
                f"{stem + self.zeros}: expected zero points of 128 alone, since int8 has none, got others in "
                f"{bad} of {zeros.numel()} words; quantise the model with sym=True"
            )
        return state, aside

    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        found, stem = super().write(state, aside, weight), self.stem(weight)
        scale = found[stem + self.scale].T.contiguous()
        zeros = torch.full((scale.shape[0], scale.shape[1] // 4), self.zero_words, dtype=torch.int32)
        return found | {stem + self.scale: scale, stem + self.zeros: zeros.to(scale.device)}

    def codes_in(self, tensors: Mapping[str, Tensor], stem: str) -> Tensor:
        return tensors[self.codes].T.contiguous().view(torch.uint8) ^ 128

    def codes_of(self, packed: Tensor) -> Tensor:
        return (packed ^ 128).view(torch.int32).T.contiguous()


class GptqInt8V2(GptqInt8):
    title, variants = "GPTQ v2 in 8 bits", ("gptq_v2 in 8 bits",)
    zero_words = 0x80808080 - (1 << 32)
