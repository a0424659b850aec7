"""One step of AdamW, Adam or Lion for all parameters at once, with moments in 32 or 8 bits.

The order of operations is that of bitsandbytes 0.50.2 (backends/cpu/ops.py, `optimizer_update_32bit`), and
so are 8-bit moments (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): blocks of 256
elements with one absmax each, `state1` by the signed and `state2` by the unsigned dynamic map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.code_tables import dynamic_thresholds, moment_values
from ..core.op import Op
from .lora.dropout import philox

STATE_BLOCK = 256
"""Elements of a moment that share one absmax."""

KINDS = ("adamw", "adam", "lion")


class AdamW(Op):
    """Updates params, moments and absmax in place, elementwise.

    Lists have one entry per parameter. params and grads: of one floating dtype per parameter. state1, state2:
    fp32, or both uint8 with absmax1 and absmax2 fp32 (ceil(numel / 256),); with fp32 moments absmax has no
    elements. For "lion", state2 and absmax2 are empty lists. `compensation`: an empty list, or a tensor like
    each bf16 parameter and tensors without elements for others. All tensors are contiguous and on one device.

    `step`, int64, one per parameter: its number of this step, from 1. Parameter i uses the hyperparameters of
    group[i]: lr fp32 (groups,), beta1, beta2, eps, weight_decay. Expressions of these alone are computed in
    fp64 and rounded to fp32 once:
        b1 = beta1, w1 = 1 - beta1, b2 = beta2, w2 = 1 - beta2, c2 = sqrt(1 - beta2^step),
        rate = -lr c2 / (1 - beta1^step), floor = eps c2, decay = 1 - lr weight_decay
    All else is in fp32 (fp64 for fp64 parameters), each operation rounded, no fused multiply-add:
        g = grad * factor;  "adam": g = g + weight_decay * p
        m = m * b1 + w1 * g;  v = v * b2 + (w2 * g) * g
        "adamw": p = p * decay
        p = p + rate * (m / (sqrt(v) + floor))
    "lion": p = p * decay;  p = p - lr * sign(m * b1 + w1 * g);  m = m * b2 + w2 * g. Moments, absmax and
    codes are bit-equal on every back end (except that max_grad_norm may sum in another order); p may differ
    by approximate division and square root.

    factor = 1 / grad_scale (0-dim fp32, 1 without it), and with max_grad_norm > 0 times
    min(1, max_grad_norm / (norm + 1e-6)), with the norm of all g = grad / grad_scale together.
    `factor` (0-dim fp32, from `clip_factor`) overrides both, for a step of several calls. If found_inf (one
    element, fp32) is not 0, nothing is changed.

    8 bits: a moment is map[code] * absmax, except that code 0 of the second is read as half the map's first
    midpoint (see `code_tables.moment_values`; bitsandbytes reads 0). It is written as absmax = max |x| over
    the block, and as code the number of midpoints of the map below x * (1 / absmax), so that a tie takes the
    lower code; 1 / absmax is 0 where it overflows. NaN or Inf in a gradient makes its element of the
    parameter NaN, as in torch (for "lion" Inf is a gradient of its sign), and all elements if max_grad_norm >
    0. 8-bit moments stay finite: where one moment of an element is not, 0 is written to both. (In
    bitsandbytes the absmax, and with it 256 elements, are lost.)

    p is rounded to its dtype, to nearest. With `seed` (0-dim int64), a bf16 parameter is rounded
    stochastically: 16 random bits are added below its own, and the lower half is truncated. They are the
    upper half of word e % 4 of Philox block e // 4 for element e, with key `seed`, stream i for parameter i,
    and step[i] in the counter's last word. With compensation, p + compensation is updated, and compensation
    becomes p's rounding error, in bf16.
    """

    name = "adamw"
    schema = (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, "
        "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor(f!)[] compensation, Tensor step, int[] group, "
        "Tensor lr, float[] beta1, float[] beta2, float[] eps, float[] weight_decay, str kind, "
        "Tensor? grad_scale, Tensor? found_inf, float max_grad_norm, Tensor? seed, Tensor? factor) -> ()"
    )

    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> None:
        if args.found_inf is not None and bool(args.found_inf != 0):
            return
        factor = _factor(args) if args.factor is None else args.factor
        for i in range(len(args.params)):
            _update(args, i, factor)

    @staticmethod
    def fake(args: Any) -> None:
        return None


class ClipFactor(Op):
    """The factor of a step of `adamw` with these gradients: fp32 0-dim, bit-equal to the one it computes.

    grads: contiguous, on one device, not all empty. max_grad_norm: above 0.
    """

    name = "clip_factor"
    schema = "(Tensor[] grads, Tensor? grad_scale, float max_grad_norm) -> Tensor"

    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        return _factor(args)

    @staticmethod
    def fake(args: Any) -> Tensor:
        found: Tensor = args.grads[0].new_empty((), dtype=torch.float32)
        return found


def _factor(args: Any) -> Tensor:
    """Factor of all gradients, fp32 0-dim."""
    factor = torch.ones((), device=args.grads[0].device if args.grads else None)
    if args.grad_scale is not None:
        factor = 1 / args.grad_scale.float().reshape(())
    if args.max_grad_norm > 0 and args.grads:
        squares = torch.stack([(g.double() * factor).square().sum() for g in args.grads])
        norm = squares.sum().sqrt().float()
        factor = factor * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return factor


def _update(args: Any, i: int, factor: Tensor) -> None:
    param, group, lion = args.params[i], args.group[i], args.kind == "lion"
    acc = torch.float64 if param.dtype == torch.float64 else torch.float32
    beta1, beta2, wd = args.beta1[group], args.beta2[group], args.weight_decay[group]
    lr, step = args.lr[group].double(), args.step[i].double()

    g = args.grads[i].reshape(-1).to(acc) * factor.to(acc)
    p = param.reshape(-1).to(acc)
    compensated = bool(args.compensation) and args.compensation[i].numel() > 0
    if compensated:
        p = p + args.compensation[i].reshape(-1).to(acc)
    m = _moment(args.state1[i], args.absmax1[i], True, acc)
    b1, w1, b2, w2 = beta1, 1 - beta1, beta2, 1 - beta2
    if args.kind == "adam" and wd != 0:
        g = g + p * wd
    elif wd != 0:
        p = p * (1 - lr * wd).to(acc)
    if lion:
        u = m * b1 + g * w1
        sign = torch.where(u > 0, 1.0, torch.where(u < 0, -1.0, u))
        p = p - sign * lr.to(acc)
        m = m * b2 + g * w2
        moments = [m]
    else:
        v = _moment(args.state2[i], args.absmax2[i], False, acc)
        c1, c2 = 1 - beta1**step, (1 - beta2**step).sqrt()
        m = m * b1 + g * w1
        v = v * b2 + (g * w2) * g
        rate, floor = (-lr * c2 / c1).to(acc), (args.eps[group] * c2).to(acc)
        # In fp64, because torch's fp32 square root is not always correctly rounded.
        p = p + (m / (v.double().sqrt().to(acc) + floor)) * rate
        moments = [m, v]

    finite = torch.stack([x.isfinite() for x in moments]).all(0)
    states = ((args.state1, args.absmax1), (args.state2, args.absmax2))
    for x, (state, absmax) in zip(moments, states, strict=False):
        signed = state is args.state1
        write_moment(x, finite, state[i], absmax[i], signed)
    rounded = p.to(param.dtype)
    if args.seed is not None and param.dtype == torch.bfloat16:
        rounded = round_stochastically(p, args.seed, i, args.step[i])
    if compensated:
        args.compensation[i].copy_((p - rounded.to(acc)).view_as(param))
    param.copy_(rounded.view_as(param))


def _moment(state: Tensor, absmax: Tensor, signed: bool, acc: torch.dtype) -> Tensor:
    flat = state.reshape(-1)
    if state.dtype != torch.uint8:
        return flat.to(acc)
    scale = absmax.repeat_interleave(STATE_BLOCK)[: flat.numel()]
    return (moment_values(flat.device, signed)[flat.long()] * scale).to(acc)


def write_moment(x: Tensor, finite: Tensor, state: Tensor, absmax: Tensor, signed: bool) -> None:
    """Writes a moment to `state`, with zeros for what is not finite, and the scales of its blocks to `absmax`
    if `state` has codes."""
    if state.dtype != torch.uint8:
        state.copy_(x.view_as(state))
        return
    x = torch.where(finite, x, 0.0).float()
    blocks = F.pad(x, (0, absmax.numel() * STATE_BLOCK - x.numel())).view(-1, STATE_BLOCK)
    scale = blocks.abs().amax(1)
    inverse = 1 / scale
    inverse = torch.where(inverse.isinf(), 0.0, inverse)
    codes = torch.bucketize(blocks * inverse[:, None], dynamic_thresholds(x.device, signed))
    state.copy_(codes.view(-1)[: x.numel()].view_as(state))
    absmax.copy_(scale)


def round_stochastically(p: Tensor, seed: Tensor, stream: int, step: Tensor) -> Tensor:
    """fp32 to bf16, to either neighbour, the nearer one with higher probability; NaN stays NaN."""
    block = torch.arange((p.numel() + 3) // 4, device=p.device)
    words = torch.stack(philox(block, seed, stream, step & 0xFFFFFFFF), 1).reshape(-1)[: p.numel()]
    bits = (p.float().view(torch.int32).long() & 0xFFFFFFFF) + (words >> 16)
    high = bits >> 16 & 0xFFFF
    signed = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16)
    return torch.where(p.isnan(), torch.nan, signed.view(torch.bfloat16))
