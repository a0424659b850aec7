"""NVFP4 as NVIDIA's Model Optimizer exports it: the scale of the whole weight multiplies."""

from __future__ import annotations

from torch import Tensor

from ...core.formats import e4m3_values
from .nvfp4 import Nvfp4
from .owner import Config

_ALGORITHM = "NVFP4"


class ModelOpt(Nvfp4):
    method, title = "modelopt", "NVFP4 of modelopt"
    codes, whole = "", "_scale_2"
    endings = (codes, "_scale", whole)
    marks = (whole,)
    beside = ("input_scale", "k_scale", "v_scale")

    def check(self, config: Config) -> None:
        if config.get("quant_algo") != _ALGORITHM:
            raise ValueError(
                f"quant_algo: expected {_ALGORITHM!r} of modelopt, got {config.get('quant_algo')!r}"
            )
        self.check_groups(config)

    def values(self, whole: Tensor) -> Tensor:
        return e4m3_values(whole.device) * whole

    def whole_of(self, one: Tensor) -> Tensor:
        return one
