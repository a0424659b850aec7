"""NVFP4 as compressed-tensors writes it (`nvfp4-pack-quantized`): the scale of the whole weight divides."""

from __future__ import annotations

from torch import Tensor

from ...core.formats import e4m3_values
from .nvfp4 import Nvfp4
from .owner import Config

FORMAT = "nvfp4-pack-quantized"
_REFUSED = ("kv_cache_scheme", "sparsity_config", "transform_config")


class CompressedTensors(Nvfp4):
    method, title = "compressed-tensors", "NVFP4 of compressed-tensors"
    codes, whole = "_packed", "_global_scale"
    endings = (codes, "_scale", whole)
    marks = (codes, whole)
    beside = ("input_global_scale",)

    def check(self, config: Config) -> None:
        if config.get("format") != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT!r} of compressed-tensors, got {config.get('format')!r}"
            )
        for key in _REFUSED:
            if config.get(key):
                raise ValueError(f"{key}: expected none beside NVFP4 weights, got {config[key]!r}")
        self.check_groups(config)

    def values(self, whole: Tensor) -> Tensor:
        return e4m3_values(whole.device) / whole

    def whole_of(self, one: Tensor) -> Tensor:
        return 1 / one.view(1)
