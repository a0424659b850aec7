"""The formats of NVIDIA's Model Optimizer: NVFP4, and FP8 with a scale for each weight or row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ...core.formats import e4m3_values
from .byte_codes import Fp8
from .config_groups import Grouped
from .nvfp4 import Nvfp4


class ModelOpt(Grouped):
    method, variant_key = "modelopt", "quant_algo"
    beside = ("input_scale", "k_scale", "v_scale")


class ModelOptNvfp4(ModelOpt, Nvfp4):
    """The scale of the whole weight multiplies."""

    variants = ("NVFP4", "W4A16_NVFP4")
    title = "NVFP4 of modelopt"
    codes, whole = "weight", "weight_scale_2"
    parts = (codes, "weight_scale", whole)
    marks = (whole,)

    def values(self, whole: Tensor) -> Tensor:
        return e4m3_values(whole.device) * whole

    def whole_of(self, one: Tensor) -> Tensor:
        return one


class ModelOptFp8(ModelOpt, Fp8):
    """With a scale of the weight, or of each row."""

    variants = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    title = "FP8 of modelopt"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_bits": (8,), "type": ("float",), "symmetric": (True,)
    }  # fmt: skip
    scale = "weight_scale"
    parts = (Fp8.codes, scale)
    marks = (scale,)
