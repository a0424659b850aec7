"""The parameters of one adapter in one sublayer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.arguments import autocast_dtype
from ..ops.bottleneck.bottleneck import bottleneck
from ..ops.bottleneck.multi_bottleneck import BottleneckParameters
from .config import AdapterConfig


class BottleneckAdapter(nn.Module):
    """The parameters of one adapter in one place: plain parameters, so that PEFT and quantisers see no linear
    layer.

    up and the biases start at zero, so an untrained adapter changes no bit.
    """

    def __init__(
        self, config: AdapterConfig, features: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.in_training = False
        r = config.bottleneck_size(features)

        def zeros(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if wanted else None

        self.norm_weight = zeros(config.norm, features)
        self.norm_bias = zeros(config.norm, features)
        self.down = nn.Parameter(torch.zeros(r, features, device=device, dtype=dtype))
        self.down_bias = zeros(config.bias, r)
        self.up = nn.Parameter(torch.zeros(features, r, device=device, dtype=dtype))
        self.up_bias = zeros(config.bias, features)

    def initialise(self) -> None:
        """Initialises `down` like LoRA's A."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    @property
    def reads(self) -> str:
        """Which tensor the adapter reads: the sublayer's "output", its "input", or the "norm" after it."""
        return "input" if self.config.parallel else "norm" if self.config.after_norm else "output"

    def parameters_for(self, x: Tensor) -> BottleneckParameters:
        """Parameters in fp32 or x's dtype, as `bottleneck` takes them. Under autocast the matrices are cast
        to x's dtype, like those of nn.Linear."""

        def kept(parameter: Any) -> Any:
            wide = parameter is None or parameter.dtype in (torch.float32, x.dtype)
            return parameter if wide else parameter.to(x.dtype)

        rounds = autocast_dtype(x.device.type) == x.dtype
        return BottleneckParameters(
            self.down.to(x.dtype) if rounds else kept(self.down),
            self.up.to(x.dtype) if rounds else kept(self.up),
            kept(self.down_bias),
            kept(self.up_bias),
            self.config.activation,
            self.config.scaling,
            kept(self.norm_weight),
            kept(self.norm_bias),
            dropout_p=self.config.dropout if self.training else 0.0,
        )

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Applies the adapter to `x`. residual None means `x`."""
        p = self.parameters_for(x)
        return bottleneck(
            x, p.down, p.up, p.down_bias, p.up_bias, p.activation, p.scaling, residual, p.norm_weight,
            p.norm_bias, p.norm_eps, p.dropout_p,
        )  # fmt: skip
