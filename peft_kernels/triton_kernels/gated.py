"""activation(gate) * up, the middle of a gated MLP, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .core.common import check, check_float, matching
from .core.launch import cdiv, config, launch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
GATED = config(8, 3, BLOCK=2048)

HALF_ROOT = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
TANH_1 = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_3 = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)

LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to fp32, and the remainder
LOG2_E_REST = tl.constexpr(1 / math.log(2) - 1.4426950216293335)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def exact_exp(x):
    """e^x for x <= 0, within two roundings. `tl.exp` rounds x log2(e), an error that grows with x."""
    x = tl.where(x < -200.0, -200.0, x)  # e^x is 0 below; Inf would give NaN
    power = x * LOG2_E
    rest = tl.fma(x, LOG2_E, -power) + x * LOG2_E_REST
    value = tl.exp2(power)
    return tl.fma(value, rest * LN_2, value)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x), and 1 minus that without cancellation."""
    if EXACT:
        e = exact_exp(-tl.abs(x))
        large = tl.div_rn(1.0, 1.0 + e)
    else:
        e = tl.exp(-tl.abs(x))
        large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Value and derivative, fp32. EXACT: for fp32 results; 16-bit ones do not show the difference."""
    if ACTIVATION == "silu":
        s, rest = sigmoid(x, EXACT)
        value = x * s
        derivative = s * (1.0 + x * rest)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * HALF_ROOT))
        value = x * cdf
        derivative = cdf + x * (DENSITY * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u) with 2 u = x (TANH_1 + TANH_3 x^2).
        square = x * x
        s, rest = sigmoid(x * (TANH_1 + TANH_3 * square), EXACT)
        value = x * s
        derivative = s + value * rest * (TANH_1 + 3 * TANH_3 * square)
    else:
        value = tl.where(x <= 0.0, 0.0, x)  # NaN stays
        derivative = tl.where(x > 0.0, 1.0, 0.0)
    return value, derivative


@triton.jit
def gated_kernel(gate_ptr, up_ptr, out_ptr, numel, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    g = tl.load(gate_ptr + element, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + element, mask=inside, other=0.0).to(tl.float32)
    value, _ = activate(g, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    tl.store(out_ptr + element, (value * u).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, numel, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    d = tl.load(dy_ptr + element, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + element, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + element, mask=inside, other=0.0).to(tl.float32)
    value, derivative = activate(g, ACTIVATION, dup_ptr.dtype.element_ty == tl.float32)
    tl.store(dgate_ptr + element, (d * u * derivative).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + element, (d * value).to(dup_ptr.dtype.element_ty), mask=inside)


def gated_activation(args: Any) -> Tensor:
    gate, up = _checked(args.activation, args.gate, up=args.up)
    out = torch.empty_like(gate)
    _run(gated_kernel, args.activation, gate, up, out)
    return out


def gated_activation_backward(args: Any) -> tuple[Tensor, Tensor]:
    gate, up, dy = _checked(args.activation, args.gate, up=args.up, dy=args.dy)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _run(gated_backward_kernel, args.activation, dy, gate, up, dgate, dup)
    return dgate, dup


def _checked(activation: str, gate: Tensor, **like_gate: Tensor) -> list[Tensor]:
    check_float(gate, "gate")
    others = [matching(t, gate, name) for name, t in like_gate.items()]
    check(activation in ACTIVATIONS, "activation", "silu, gelu, gelu_tanh or relu", activation)
    return [gate.contiguous(), *others]


def _run(kernel: object, activation: str, *tensors: Tensor) -> None:
    numel = tensors[0].numel()
    grid = (cdiv(numel, GATED["BLOCK"]),)
    launch(kernel, grid, *tensors, numel, config=GATED, ACTIVATION=activation)
