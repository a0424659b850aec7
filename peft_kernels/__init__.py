"""Kernels for parameter-efficient fine-tuning: NF4 dequantise-matmul and LoRA, forward and backward.

import peft_kernels as pk

pk.quantize_model(model)      # nn.Linear -> 4-bit NF4Linear, in place
model = peft.get_peft_model(model, lora_config)
pk.patch(model)               # PEFT's LoRA layers run fused kernels; pk.unpatch(model) takes them out again
"""

from __future__ import annotations

from . import adapters, nn, optim, prefix, prompts, serving
from .checkpoints.load import load_checkpoint
from .core import backends, dispatch
from .core.dispatch import use_backend
from .host_memory import keep_freed_memory
from .nf4.weight import NF4Weight, PackedWeight
from .ops.block.attention import attention
from .ops.block.rms_norm import add_rms_norm, rms_norm
from .ops.block.rotary import rotary
from .ops.bottleneck.bottleneck import bottleneck
from .ops.bottleneck.multi_bottleneck import BottleneckParameters, multi_bottleneck
from .ops.experts import experts_linear, experts_lora_linear
from .ops.gated import gated_activation, gated_mlp
from .ops.linear import nf4_linear
from .ops.lora.dora import dora_linear
from .ops.lora.lora import lora_linear
from .ops.lora.multi_lora import AdaptedLinear, Adapter, multi_lora_linear
from .ops.loss.head import Head
from .ops.loss.linear_kl import linear_kl
from .ops.loss.token_loss import linear_cross_entropy, token_log_probs
from .patch import explain, patch, patched, unpatch
from .quantize.model import quantize_model
from .triton_kernels.backend import BACKEND as _TRITON

dispatch.install(backends.cuda.BACKEND, _TRITON, backends.cpu.BACKEND, backends.reference.BACKEND)

__version__ = "0.2.0"

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "BottleneckParameters",
    "Head",
    "NF4Weight",
    "PackedWeight",
    "adapters",
    "add_rms_norm",
    "attention",
    "bottleneck",
    "dora_linear",
    "experts_linear",
    "experts_lora_linear",
    "explain",
    "gated_activation",
    "gated_mlp",
    "keep_freed_memory",
    "linear_cross_entropy",
    "linear_kl",
    "load_checkpoint",
    "lora_linear",
    "multi_bottleneck",
    "multi_lora_linear",
    "nf4_linear",
    "nn",
    "optim",
    "patch",
    "patched",
    "prefix",
    "prompts",
    "quantize_model",
    "rms_norm",
    "rotary",
    "serving",
    "token_log_probs",
    "unpatch",
    "use_backend",
]
