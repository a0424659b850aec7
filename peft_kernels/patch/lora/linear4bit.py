"""bitsandbytes' Linear4bit on our kernels, which read its Params4bit in place.

Unlike its own forward, this one never repacks the weight in evaluation mode, so state_dict and gradients stay
correct after an evaluation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.linear import nf4_linear
from ..fused import Fallback, Fused, computed_by
from ..input_spec import input_spec
from ..rules.linear import fused_operands


def _run(module: Any, x: Tensor) -> Tensor | Fallback:
    base = fused_operands(module, input_spec(x.dtype, x.device))
    if isinstance(base, Fallback):
        return base
    weight: Any = base.weight
    y = nf4_linear(x.to(base.dtype), weight, base.bias, compute_dtype=base.compute_dtype)
    return y.to(base.out_dtype)


@computed_by(_run)
class FusedLinear4bit(Fused):
    """The GEMM with a bitsandbytes weight on our kernel."""
