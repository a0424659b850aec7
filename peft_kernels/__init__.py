"""Kernels for parameter-efficient fine-tuning: NF4 dequantise-matmul and LoRA, forward and backward.

import peft_kernels as pk

pk.quantize_model(model)      # nn.Linear -> 4-bit NF4Linear, in place
model = peft.get_peft_model(model, lora_config)
pk.patch(model)               # PEFT's LoRA layers run fused kernels; pk.unpatch(model) takes them out again
"""

from __future__ import annotations

from . import dispatch as _dispatch

_dispatch.install()

from . import nn, optim  # noqa: E402
from .dispatch import use_backend  # noqa: E402
from .functional import (  # noqa: E402
    AdaptedLinear,
    Adapter,
    dora_linear,
    gated_activation,
    gated_mlp,
    lora_linear,
    multi_lora_linear,
    nf4_linear,
)
from .nf4 import NF4Weight  # noqa: E402
from .patch import explain, patch, patched, unpatch  # noqa: E402
from .quantize import quantize_model  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "NF4Weight",
    "dora_linear",
    "explain",
    "gated_activation",
    "gated_mlp",
    "lora_linear",
    "multi_lora_linear",
    "nf4_linear",
    "nn",
    "optim",
    "patch",
    "patched",
    "quantize_model",
    "unpatch",
    "use_backend",
]
