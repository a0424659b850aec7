"""The meaning of every op, in plain torch.

Each function here is what the op of the same name in `spec` computes, for any floating dtype (fp64 included:
run so, it is the truth that kernels are judged against) and any device. Clarity before speed: weights are
materialised.
"""

from .common import accumulator_dtype, rows
from .dora import dora_norm, dora_scale, dora_scale_backward
from .dropout import dropout
from .gated import ACTIVATIONS, gated_activation, gated_activation_backward
from .lora import lora_linear, lora_linear_backward, multi_lora_linear, multi_lora_linear_backward
from .nf4 import (
    dequantize_nf4,
    nf4_linear,
    nf4_linear_dx,
    quantize_absmax,
    quantize_nf4,
    unpack_absmax,
)

__all__ = [
    "ACTIVATIONS",
    "accumulator_dtype",
    "dequantize_nf4",
    "dora_norm",
    "dora_scale",
    "dora_scale_backward",
    "dropout",
    "gated_activation",
    "gated_activation_backward",
    "lora_linear",
    "lora_linear_backward",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "nf4_linear",
    "nf4_linear_dx",
    "quantize_absmax",
    "quantize_nf4",
    "rows",
    "unpack_absmax",
]
