"""activation(gate) * up, the middle of a gated MLP (SwiGLU, GeGLU; Shazeer 2020), and the MLP as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dispatch
from ..core.op import Base, Op, columns
from ..core.wrong_types import names_wrong_types
from . import arguments
from .common import accumulator_dtype, empty_h
from .lora.multi_lora import AdaptedLinear, flatten, layer_gradients, rounding


class GatedActivation(Op):
    name = "gated_activation"
    schema = "(Tensor gate, Tensor up, str activation) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        gate, up, activation = args
        acc = accumulator_dtype(gate.dtype)
        # Contiguous like other back ends' results; torch's elementwise functions keep the layout of gate.
        return (ACTIVATIONS[activation](gate.to(acc))[0] * up.to(acc)).to(gate.dtype).contiguous()

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.gate.new_empty(args.gate.shape)

    differentiable = ("gate", "up")

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        d_gate, d_up = ops.gated_activation_backward(dy, *args)
        return {"gate": d_gate, "up": d_up}


class GatedActivationBackward(Op):
    name = "gated_activation_backward"
    schema = "(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)"

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        dy, gate, up, activation = args
        acc = accumulator_dtype(gate.dtype)
        value, derivative = ACTIVATIONS[activation](gate.to(acc))
        d = dy.to(acc)
        dgate, dup = (d * up.to(acc) * derivative).to(gate.dtype), (d * value).to(up.dtype)
        return dgate.contiguous(), dup.contiguous()

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        return args.gate.new_empty(args.gate.shape), args.up.new_empty(args.up.shape)


class GatedMlp(Op):
    """down(activation(gate(x)) * up(x)), layers in the order gate, up, down. Also returns what backward
    needs: the outputs of gate and up, and x A^T of their adapters and of down's."""

    name = "gated_mlp"
    schema = (
        "(Tensor x, $bases, SymInt[] out_features, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, "
        "int[] layer, float[] scaling, float[] dropout_p, Tensor? seed, str activation) "
        "-> (Tensor y, Tensor gate, Tensor up, Tensor h, Tensor h_down)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        def call(half: _Half, x: Tensor, seed: Tensor | None) -> Any:
            sizes, biases = half.of_layers(args.out_features, args.bias)
            a, b, s, p = half.of_adapters(args.lora_a, args.lora_b, args.scaling, args.dropout_p)
            layers = *half.bases, sizes, biases
            return ops.multi_lora_linear(x, *layers, a, b, half.layer, s, p, seed, [0] * len(a), None, None)

        first, last = _halves(args)
        (gate, up), h = call(first, args.x, args.seed)
        (y,), h_down = call(last, ops.gated_activation(gate, up, args.activation), _down_seed(args.seed))
        return y, gate, up, h, h_down

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        gate, up, y = (args.x.new_empty((*args.x.shape[:-1], n)) for n in args.out_features)
        ranks = [
            sum(a.shape[0] for a, j in zip(args.lora_a, args.layer, strict=True) if (j == 2) is down)
            for down in (False, True)
        ]
        return y, gate, up, empty_h(args.x, ranks[0]), empty_h(args.x, ranks[1])

    differentiable = ("x", "weight", "bias", "lora_a", "lora_b")
    rounding = ("lora_a", "lora_b")
    saved_meta = ("bias", "y")
    saved_outputs = ("gate", "up", "h", "h_down")

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        gate, up = results.gate, results.up
        first, last = _halves(args)

        def call(
            half: _Half, dy: list[Tensor], x: Tensor, h: Tensor, seed: Tensor | None, need_dx: bool
        ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Any], list[Any]]:
            a, b, s, p = half.of_adapters(args.lora_a, args.lora_b, args.scaling, args.dropout_p)
            dx, da, db = ops.multi_lora_linear_backward(
                dy, x, h, *half.bases, a, b, half.layer, s, p, seed, [0] * len(a), None, None,
                need_dx, *half.of_adapters(need.lora_a, need.lora_b),
            )  # fmt: skip
            of_layers = half.of_layers(args.bias, need.weight, need.bias)
            return dx, da, db, *layer_gradients(ops, dy, x, None, *of_layers)

        product = ops.gated_activation(gate, up, args.activation)
        d_product, *of_last = call(last, [dy], product, results.h_down, _down_seed(args.seed), True)
        del product
        d_gate, d_up = ops.gated_activation_backward(d_product, gate, up, args.activation)
        del d_product
        dx, *of_first = call(first, [d_gate, d_up], args.x, results.h, args.seed, need.x)
        da, db = ([None] * len(args.layer) for _ in range(2))
        for half, found in ((first, of_first), (last, of_last)):
            for i, one_da, one_db in zip(half.chosen, *found[:2], strict=True):
                da[i], db[i] = one_da, one_db
        dw, dbias = (of_first[i] + of_last[i] for i in (2, 3))
        return {"x": dx, "weight": dw, "bias": dbias, "lora_a": da, "lora_b": db}

    @staticmethod
    def flops(args: Any) -> int:
        gate, up, down = args.out_features
        m = prod(args.x[:-1])
        base = 2 * m * (args.x[-1] * (gate + up) + gate * down)
        return base + sum(2 * m * (prod(a) + prod(b)) for a, b in zip(args.lora_a, args.lora_b, strict=True))


class _Half:
    """Selects the layers `begin` to `end` (gate and up, or down) from an MLP's lists, for one of its two
    calls."""

    def __init__(self, bases: Sequence[Base], layer: Sequence[int], begin: int, end: int) -> None:
        self._layers = slice(begin, end)
        self.bases = columns(bases[begin:end])
        self.chosen = [i for i, j in enumerate(layer) if begin <= j < end]
        self.layer = [layer[i] - begin for i in self.chosen]

    def of_layers(self, *lists: Any) -> list[Any]:
        return [values[self._layers] for values in lists]

    def of_adapters(self, *lists: Any) -> list[Any]:
        return [[values[i] for i in self.chosen] for values in lists]


def _halves(args: Any) -> tuple[_Half, _Half]:
    return _Half(args.bases, args.layer, 0, 2), _Half(args.bases, args.layer, 2, 3)


def _down_seed(seed: Tensor | None) -> Tensor | None:
    # Another key, so that gate and down do not draw the same mask.
    return None if seed is None else seed + 1


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
    derivative = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)
    return F.gelu(x, approximate="tanh"), derivative


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(x), (x > 0).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
"""Each returns value and derivative."""


@names_wrong_types
def gated_mlp(
    x: Tensor,
    gate: AdaptedLinear,
    up: AdaptedLinear,
    down: AdaptedLinear,
    activation: str = "silu",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`down(activation(gate(x)) * up(x))`: SwiGLU, GeGLU (Shazeer 2020), each layer with its adapters.

    Saved for backward: x, the outputs of gate and up, x A^T of each adapter and the parameters;
    activation(gate) * up is recomputed.

    Parameters
    ----------
    activation : str
        "silu", "gelu", "gelu_tanh" or "relu".
    compute_dtype : torch.dtype, optional
        fp32, bf16 or fp16: x is rounded to it once, everything inside is as for an x of that dtype, and only
        that copy is saved. The result has x's dtype. By default x's dtype.
    """
    compute = arguments.compute_type(x, compute_dtype)
    args = gated_mlp_args(x, gate, up, down, activation, compute)
    rounds = rounding((gate, up, down), compute)
    y: Tensor = dispatch.call("gated_mlp", x.to(compute), *args, rounds=rounds)[0]
    return y.to(x.dtype)


def gated_mlp_args(
    x: Tensor,
    gate: AdaptedLinear,
    up: AdaptedLinear,
    down: AdaptedLinear,
    activation: str,
    compute: torch.dtype,
) -> tuple[Any, ...]:
    """The checked arguments of op `gated_mlp` after x, which is to have dtype `compute`."""
    check_activation(activation)
    hidden = gate.weight.shape[0]
    if up.weight.shape[0] != hidden:
        raise ValueError(f"up: expected {hidden} output features like gate, got {up.weight.shape[0]}")
    features = [x.shape[-1], x.shape[-1], hidden]
    base, adapters, _, seed = flatten(x, (gate, up, down), features, compute, compute)
    return (*base, *adapters, seed, activation)


@names_wrong_types
def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`activation(gate) * up` in one pass, computed in fp32. Saved for backward: gate and up."""
    check_activation(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        expected, got = f"{gate.dtype} of shape {tuple(gate.shape)}", f"{up.dtype} of {tuple(up.shape)}"
        raise ValueError(f"up: expected {expected} like gate, got {got}")
    y: Tensor = dispatch.call("gated_activation", gate, up, activation)
    return y


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
