"""Values and weights on the device of run.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lib.cases import DTYPES, Shape
from ..lib.layers import Weights

DTYPE = "bf16"


def normal(
    device: str, *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = DTYPES[DTYPE]
) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


class DeviceWeights(Weights):
    """`seed`: from 0; layers of one shape with another seed have other values."""

    def __init__(self, shape: Shape, device: str, seed: int = 0) -> None:
        super().__init__(*shape, DTYPES[DTYPE])
        self.device, self.seed = device, seed

    def normal(self, *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        seed += 10 * self.seed
        return normal(self.device, *shape, seed=seed, scale=scale, dtype=dtype or self.dtype)
