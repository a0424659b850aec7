"""The functions that implement ops with Triton kernels: each has its op's name and takes named arguments.

This file imports Triton, so back end `triton` imports it on first use.
"""

# ruff: noqa: F401

from .block.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from .block.rotary import rotary
from .bottleneck.bottleneck import bottleneck, bottleneck_backward
from .bottleneck.multi_bottleneck import multi_bottleneck, multi_bottleneck_backward
from .core.dropout import dropout
from .core.launch import check_usable
from .experts.experts import (
    experts_linear,
    experts_linear_dx,
    experts_lora_linear,
    experts_lora_linear_backward,
)
from .gated import gated_activation, gated_activation_backward
from .linear.linear import nf4_linear, nf4_linear_dx
from .lora.dora import dora_scale, dora_scale_backward
from .lora.dora_norm import dora_norm
from .lora.lora import lora_linear, lora_linear_backward, multi_lora_linear, multi_lora_linear_backward
from .loss import linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_trained
from .nf4.nf4 import dequantize_nf4, quantize_absmax, quantize_nf4, unpack_absmax
from .optim.adamw import adamw, clip_factor
