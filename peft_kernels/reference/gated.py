"""activation(gate) * up, the middle of a gated MLP (SwiGLU, GeGLU; Shazeer 2020), and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulator_dtype


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return F.gelu(x), cdf + x * pdf


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x * x * x))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)
    return F.gelu(x, approximate="tanh"), slope


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(x), (x > 0).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
"""Each gives value and derivative."""


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    acc = accumulator_dtype(gate.dtype)
    # Contiguous, as back ends give it: elementwise functions of torch would keep the layout of gate.
    return (ACTIVATIONS[activation](gate.to(acc))[0] * up.to(acc)).to(gate.dtype).contiguous()


def gated_activation_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    acc = accumulator_dtype(gate.dtype)
    value, slope = ACTIVATIONS[activation](gate.to(acc))
    d = dy.to(acc)
    dgate, dup = (d * up.to(acc) * slope).to(gate.dtype), (d * value).to(up.dtype)
    return dgate.contiguous(), dup.contiguous()
