"""Bottleneck adapters: residual + scaling * up(dropout(activation(down(layer_norm(x))))) (Houlsby et al.
2019; with a separate residual and a scaling: He et al. 2022)."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import dispatch
from ...core.op import Op
from ...core.wrong_types import names_wrong_types
from ..common import accumulator_dtype, empty_h, empty_unless, rows
from ..gated import ACTIVATIONS, check_activation
from ..lora.dropout import apply_dropout, new_seed


class Bottleneck(Op):
    """Returns y and z = down(layer_norm(x)), which backward needs.

    residual None: x. norm_weight None: no layer norm. Dropout is applied after the activation. Where the
    adapter adds 0, of either sign, y is bit-equal to the residual.
    """

    name = "bottleneck"
    schema = (
        "(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor down, "
        "Tensor? down_bias, Tensor up, Tensor? up_bias, str activation, float scaling, float dropout_p, "
        "Tensor? seed) -> (Tensor y, Tensor z)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        acc = accumulator_dtype(args.x.dtype)
        z = F.linear(_normed(args), args.down.to(acc), _to(args.down_bias, acc))
        value = apply_dropout(ACTIVATIONS[args.activation](z)[0], args.dropout_p, args.seed)
        delta = args.scaling * F.linear(value, args.up.to(acc), _to(args.up_bias, acc))
        residual = (args.x if args.residual is None else args.residual).to(acc)
        # Signs are flipped where the residual is negative, because -0 + 0 is 0. The derivative is 1
        # everywhere, unlike that of torch.where(delta == 0, residual, ...).
        y = torch.where(torch.signbit(residual), -(-residual - delta), residual + delta).to(args.x.dtype)
        return y.contiguous(), z.contiguous()

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        y = args.x.new_empty((*args.x.shape[:-1], args.up.shape[0]))
        return y, empty_h(args.x, args.down.shape[0])

    differentiable = ("x", "residual", "norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")
    saved_meta = ("residual", "down_bias", "up_bias", "y")
    saved_outputs = ("z",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        found = ops.bottleneck_backward(
            dy, args.x, results.z, args.norm_weight, args.norm_bias, args.norm_eps, args.down, args.up,
            args.activation, args.scaling, args.dropout_p, args.seed, args.residual is None,
            need.x, need.norm_weight or need.norm_bias, need.down, need.down_bias, need.up, need.up_bias,
        )  # fmt: skip
        dx, dnorm_weight, dnorm_bias, ddown, ddown_bias, dup, dup_bias = found
        return {
            "x": dx,
            "residual": dy,
            "norm_weight": dnorm_weight,
            "norm_bias": dnorm_bias.to(args.norm_bias.dtype) if need.norm_bias else None,
            "down": ddown,
            "down_bias": ddown_bias.to(args.down_bias.dtype) if need.down_bias else None,
            "up": dup,
            "up_bias": dup_bias.to(args.up_bias.dtype) if need.up_bias else None,
        }

    @staticmethod
    def flops(args: Any) -> int:
        return 2 * prod(args.x[:-1]) * (prod(args.down) + prod(args.up))


class BottleneckBackward(Op):
    """Gradients not needed have no elements; those of biases have the accumulator dtype. adds_dy: x is also
    the residual."""

    name = "bottleneck_backward"
    schema = (
        "(Tensor dy, Tensor x, Tensor z, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
        "Tensor down, Tensor up, str activation, float scaling, float dropout_p, Tensor? seed, bool adds_dy, "
        "bool need_dx, bool need_dnorm, bool need_ddown, bool need_ddown_bias, bool need_dup, "
        "bool need_dup_bias) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor ddown, "
        "Tensor ddown_bias, Tensor dup, Tensor dup_bias)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, ...]:
        x, down, up, norm_weight = args.x, args.down, args.up, args.norm_weight
        acc = accumulator_dtype(x.dtype)
        dx, dnorm_weight, dnorm_bias, ddown, ddown_bias, dup, dup_bias = _no_gradients(args)
        dy = rows(args.dy).to(acc)
        value, derivative = ACTIVATIONS[args.activation](rows(args.z).to(acc))
        if args.need_dup_bias:
            dup_bias = args.scaling * dy.sum(0)
        if args.need_dup:
            kept = apply_dropout(value, args.dropout_p, args.seed)
            dup = (args.scaling * (dy.t() @ kept)).to(up.dtype).contiguous()
        dz = apply_dropout(args.scaling * (dy @ up.to(acc)), args.dropout_p, args.seed) * derivative
        if args.need_ddown:
            ddown = (dz.t() @ rows(_normed(args))).to(down.dtype).contiguous()
        if args.need_ddown_bias:
            ddown_bias = dz.sum(0)
        if args.need_dx or args.need_dnorm:
            d = dz @ down.to(acc)
            if norm_weight is not None:
                standard, rstd = _standardised(rows(x).to(acc), args.norm_eps)
                if args.need_dnorm:
                    dnorm_weight = (d * standard).sum(0).to(norm_weight.dtype)
                    dnorm_bias = d.sum(0)
                d = d * norm_weight.to(acc)
                means = d.mean(1, keepdim=True), (d * standard).mean(1, keepdim=True)
                d = rstd * (d - means[0] - standard * means[1])
            if args.need_dx:
                dx = (d + dy if args.adds_dy else d).to(x.dtype).view(x.shape).contiguous()
        return dx, dnorm_weight, dnorm_bias, ddown, ddown_bias, dup, dup_bias

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, ...]:
        return _no_gradients(args, full=True)

    @staticmethod
    def flops(args: Any) -> int:
        m, down, up = prod(args.x[:-1]), prod(args.down), prod(args.up)
        through = args.need_dx or args.need_dnorm
        of_dz = through or args.need_ddown or args.need_ddown_bias
        return 2 * m * (up * (args.need_dup + of_dz) + down * (args.need_ddown + through))


def _to(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _standardised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) by row, and 1 / sqrt(variance + eps)."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _normed(args: Any) -> Tensor:
    """The input of `down`, in the accumulator dtype."""
    acc = accumulator_dtype(args.x.dtype)
    x = args.x.to(acc)
    if args.norm_weight is None:
        return x
    return F.layer_norm(x, x.shape[-1:], args.norm_weight.to(acc), _to(args.norm_bias, acc), args.norm_eps)


def _no_gradients(args: Any, full: bool = False) -> tuple[Tensor, ...]:
    """Results of backward without elements; `full`: those needed are full-sized, uninitialised."""
    acc, norm, features = accumulator_dtype(args.x.dtype), args.norm_weight, args.x.shape[-1:]
    has_norm = full and args.need_dnorm and norm is not None
    return (
        empty_unless(full and args.need_dx, args.x),
        (args.x if norm is None else norm).new_empty(features if has_norm else (0,)),
        args.x.new_empty(features if has_norm else (0,), dtype=acc),
        empty_unless(full and args.need_ddown, args.down),
        args.down.new_empty(args.down.shape[:1] if full and args.need_ddown_bias else (0,), dtype=acc),
        empty_unless(full and args.need_dup, args.up),
        args.up.new_empty(args.up.shape[:1] if full and args.need_dup_bias else (0,), dtype=acc),
    )


@names_wrong_types
def bottleneck(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """`residual + scaling * (drop(activation(norm(x) down^T + down_bias)) up^T + up_bias)`: a bottleneck
    adapter (Houlsby et al. 2019), or one parallel to a sublayer (He et al. 2022) whose output is `residual`.

    Computed in fp32 and rounded once; where x and a parameter are bf16, a back end may also round the other
    operand of that parameter's GEMM to bf16. Where the adapter adds 0, as with an `up` of zeros, the result
    is bit-equal to the residual, signs of zeros included; zeros do not hide NaN or Inf in the bottleneck.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16.
    down : Tensor, (r, in_features)
    up : Tensor, (out_features, r)
    down_bias : Tensor, (r,), optional
    up_bias : Tensor, (out_features,), optional
    activation : str
        "relu", "gelu" (exact, by erf), "gelu_tanh" or "silu".
    scaling : float
    residual : Tensor, (..., out_features), optional
        Of x's dtype. By default x.
    norm_weight, norm_bias : Tensor, (in_features,), optional
        Layer norm before `down`, with `norm_eps`; none without norm_weight.
    dropout_p : float
        Probability of dropping an element of the activated bottleneck. The mask depends only on a seed
        drawn from torch's generator for x's device: it follows torch.manual_seed and activation
        checkpointing, and is not stored.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable in x, residual and all parameters, each fp32 or
    of x's dtype; gradients have their tensors' dtypes. Saved for backward: x, the bottleneck before its
    activation in fp32, the seed and the parameters.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; an unknown activation; dropout_p not in 0 to 1.
    """
    check_parameters(x, down, up, down_bias, up_bias, activation, norm_weight, norm_bias, dropout_p)
    check_residual(x, residual, up.shape[0])
    seed = new_seed(x) if dropout_p else None
    y: Tensor = dispatch.call(
        "bottleneck", x, residual, norm_weight, norm_bias, float(norm_eps), down, down_bias, up, up_bias,
        activation, float(scaling), float(dropout_p), seed,
    )[0]  # fmt: skip
    return y


def check_parameters(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dropout_p: float,
    owner: str = "",
) -> None:
    """Raises ValueError unless the parameters fit x. `owner`: prefix of names in errors."""
    check_activation(activation)
    if not x.dtype.is_floating_point or x.dim() == 0:
        raise ValueError(f"x: expected a floating dtype of shape (..., in_features), got {_kind(x)}")
    if down.dim() != 2 or down.shape[1] != x.shape[-1]:
        raise ValueError(f"{owner}down: expected shape (r, {x.shape[-1]}), got {tuple(down.shape)}")
    if not down.numel():
        raise ValueError(f"{owner}down: expected elements, got shape {tuple(down.shape)}")
    if up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"{owner}up: expected shape (out_features, {down.shape[0]}), got {tuple(up.shape)}")
    (r, k), n, dtype, device = down.shape, up.shape[0], x.dtype, x.device
    for name, parameter, shape in (
        ("down", down, (r, k)),
        ("up", up, (n, r)),
        ("down_bias", down_bias, (r,)),
        ("up_bias", up_bias, (n,)),
        ("norm_weight", norm_weight, (k,)),
        ("norm_bias", norm_bias, (k,)),
    ):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise ValueError(f"{owner}{name}: expected shape {shape}, got {tuple(parameter.shape)}")
        if parameter.dtype != dtype and parameter.dtype != torch.float32:
            raise ValueError(f"{owner}{name}: expected {dtype} like x or float32, got {parameter.dtype}")
        if parameter.device != device:
            raise ValueError(f"{owner}{name}: expected device {device} like x, got {parameter.device}")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{owner}norm_bias: expected a norm_weight too, got none")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{owner}dropout_p: expected 0 to 1, got {dropout_p}")


def check_residual(x: Tensor, residual: Tensor | None, out_features: int, owner: str = "") -> None:
    shape = (*x.shape[:-1], out_features)
    if residual is None:
        if out_features != x.shape[-1]:
            raise ValueError(
                f"{owner}up: expected {x.shape[-1]} output features like x, its residual, got {out_features}"
            )
    elif residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device:
        expected = f"{x.dtype} of shape {shape} on {x.device}"
        raise ValueError(f"residual: expected {expected}, got {_kind(residual)} on {residual.device}")


def _kind(t: Tensor) -> str:
    return f"{t.dtype} of shape {tuple(t.shape)}"
