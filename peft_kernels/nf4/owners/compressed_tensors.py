"""The formats of compressed-tensors: NVFP4, MXFP4, int4 and int8 in groups, and FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.formats import e4m3_values, e8m0_values
from ...core.packed_state import PackedState
from .byte_codes import BLOCK, ByteCodes, Fp8
from .config_groups import Grouped
from .int4 import Int4
from .nvfp4 import Nvfp4
from .owner import Config, check_scales, expect_shape, state_of_codes, swapped, tensor_of

_REFUSED = ("kv_cache_scheme", "sparsity_config", "transform_config")
_SHAPE = "weight_shape"
_WORDS = "pack-quantized"


class CompressedTensors(Grouped):
    method, variant_key = "compressed-tensors", "format"

    def variant_of(self, config: Config) -> Any:
        found = config.get("format")
        if found != _WORDS:
            return found
        groups = config.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
        eight = weights and all(isinstance(w, Mapping) and w.get("num_bits") == 8 for w in weights)
        return f"{_WORDS} of 8 bits" if eight else found

    def check(self, config: Config) -> None:
        for key in _REFUSED:
            if config.get(key):
                raise ValueError(
                    f"{key}: expected none beside {self.format.upper()} weights, got {config[key]!r}"
                )
        super().check(config)


class CompressedTensorsNvfp4(CompressedTensors, Nvfp4):
    """The scale of the whole weight divides."""

    variants = ("nvfp4-pack-quantized",)
    title = "NVFP4 of compressed-tensors"
    codes, whole = "weight_packed", "weight_global_scale"
    parts = (codes, "weight_scale", whole)
    marks = (codes, whole)
    beside = ("input_global_scale",)

    def values(self, whole: Tensor) -> Tensor:
        return e4m3_values(whole.device) / whole

    def whole_of(self, one: Tensor) -> Tensor:
        return 1 / one.view(1)


class CompressedTensorsMxfp4(CompressedTensors):
    """The codes as NVFP4's; scales in E8M0, uint8 (out, in / 32)."""

    variants = ("mxfp4-pack-quantized",)
    title, format = "MXFP4 of compressed-tensors", "mxfp4"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_bits": (4,), "type": ("float",), "group_size": (32,), "symmetric": (True,)
    }  # fmt: skip
    codes, scale = "weight_packed", "weight_scale"
    parts = (codes, scale)
    marks = (codes,)

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        stem = self.stem(weight)
        codes = tensor_of(tensors, stem, self.codes, torch.uint8)
        scales = tensor_of(tensors, stem, self.scale, torch.uint8)
        expect_shape(stem + self.scale, ("out", "in / 32"), scales.shape)
        out, blocks = scales.shape
        expect_shape(stem + self.codes, (out, blocks * self.blocksize // 2), codes.shape)
        values = e8m0_values(scales.device)
        check_scales(stem + self.scale, scales, values)
        shape = (out, blocks * self.blocksize)
        return state_of_codes(self.format, shape, codes, scales, values.clone(), weight), {}

    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None
        stem, (out, into) = self.stem(weight), state.shape
        return {
            stem + self.codes: swapped(state.packed),
            stem + self.scale: state.absmax.view(out, into // self.blocksize),
        }


class CompressedTensorsInt4(CompressedTensors, Int4):
    """Eight codes of a row in a word; the names say that codes and zero points are signed, but the words hold
    them from 0."""

    variants = (_WORDS,)
    title = "INT4 of compressed-tensors"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_bits": (4,), "type": ("int",), "strategy": ("group", "channel")
    }  # fmt: skip
    codes, scale, zeros, index = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    parts = (codes, scale, zeros)
    optional = (zeros,)
    marks = (codes, scale, zeros)
    beside = (_SHAPE, index, "input_scale", "input_zero_point", "input_global_scale")
    always_zeros = False

    def check_beside(
        self, tensors: Mapping[str, Tensor], stem: str, shape: tuple[int, int], length: int
    ) -> None:
        super().check_beside(tensors, stem, shape, length)
        _check_shape(tensors, stem, self.codes, shape)


class CompressedTensorsInt8(CompressedTensors, ByteCodes):
    """Codes in int8. Other libraries quantise activations to them too (W8A8)."""

    format = "int8"
    variants = ("int-quantized",)
    title = "INT8 of compressed-tensors"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_bits": (8,), "type": ("int",), "symmetric": (True,), "strategy": ("tensor", "channel", "group")
    }  # fmt: skip
    scale = "weight_scale"
    parts: ClassVar[tuple[str, ...]] = (ByteCodes.codes, scale)
    marks: ClassVar[tuple[str, ...]] = (scale,)
    beside: ClassVar[tuple[str, ...]] = ("input_scale", "input_zero_point")


class CompressedTensorsInt8Words(CompressedTensorsInt8):
    """Four codes of a row in a word, from 0 instead of -128."""

    variants = (f"{_WORDS} of 8 bits",)
    codes = "weight_packed"
    parts = marks = (codes, CompressedTensorsInt8.scale)
    beside = (_SHAPE, "input_scale", "input_zero_point")

    def codes_in(self, tensors: Mapping[str, Tensor], stem: str) -> Tensor:
        words = tensor_of(tensors, stem, self.codes, torch.int32)
        expect_shape(stem + self.codes, ("out", "in / 4"), words.shape)
        _check_shape(tensors, stem, self.codes, (words.shape[0], words.shape[1] * 4))
        return words.contiguous().view(torch.uint8) ^ 128

    def codes_of(self, packed: Tensor) -> Tensor:
        return (packed ^ 128).view(torch.int32)


def _check_shape(tensors: Mapping[str, Tensor], stem: str, codes: str, shape: tuple[int, int]) -> None:
    found = tensors.get(_SHAPE)
    if found is not None and not found.is_meta and found.tolist() != [*shape]:
        raise ValueError(f"{stem + _SHAPE}: expected {[*shape]}, as {codes} has it, got {found.tolist()}")


class CompressedTensorsFp8(CompressedTensors, Fp8):
    variants = ("float-quantized", "naive-quantized")
    title = "FP8 of compressed-tensors"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_bits": (8,), "type": ("float",), "symmetric": (True,), "strategy": ("tensor", "channel", "block")
    }  # fmt: skip
    scale = "weight_scale"
    parts = (Fp8.codes, scale)
    marks = (scale,)
    beside = ("input_scale", "input_zero_point")

    def check(self, config: Config) -> None:
        super().check(config)
        for name, group in config["config_groups"].items():
            weights = group["weights"]
            blocks = weights.get("block_structure")
            if weights["strategy"] == "block" and blocks != BLOCK:
                key = f"config_groups.{name}.weights.block_structure"
                raise ValueError(f"{key}: expected {BLOCK}, for FP8, got {blocks!r}")
