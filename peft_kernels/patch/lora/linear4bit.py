"""bitsandbytes' Linear4bit on our kernels, reading its Params4bit in place.

Unlike its own forward, this one never repacks the weight in evaluation mode, so that state_dict and gradients
after an evaluation stay right.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.linear import nf4_linear
from .. import eligibility as judge
from ..fused import RECORD, Fused


class FusedLinear4bit(Fused):
    """The product with a bitsandbytes weight by our kernel."""

    def forward(self: Any, x: Tensor) -> Tensor:
        record = self.__dict__.get(RECORD)
        base = "" if record is None else judge.operands(self, x.dtype, x.device)
        if isinstance(base, str):
            if record is not None:
                record.fallbacks[base] += 1
            return super().forward(x)  # type: ignore[misc]
        weight: Any = base.weight
        y = nf4_linear(x.to(base.dtype), weight, base.bias, compute_dtype=base.compute_dtype)
        return y.to(base.out_dtype)
