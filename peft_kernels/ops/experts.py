"""Linear layers of a mixture of experts: rows sorted by expert, each multiplied by its expert's weight.
Experts without rows cost nothing.

The references loop over experts and call ops of single layers, so every back end has these ops; some register
kernels without the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch
from ..core.op import Base, Op
from ..core.packed_state import HoldsPacked, PackedState
from ..core.wrong_types import names_wrong_types
from . import arguments
from .arguments import Weight
from .common import empty_h, empty_unless


class ExpertsLinear(Op):
    """Rows ends[e - 1] to ends[e] of x, (rows, in), times expert e's weight. `ends` is int32, (experts,),
    ascending, as in torch's grouped_mm. Experts are the first dimension of the weight's tensors and of the
    bias, (experts, out). Rows after the last end belong to no expert and give zeros."""

    name = "experts_linear"
    schema = "(Tensor x, Tensor ends, $nf4, SymInt out_features, Tensor? bias) -> Tensor"
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        x, n = args.x, args.out_features
        parts = [
            ops.nf4_linear(x[begin:end], *expert_base(args.base, e), n, _bias_of(args.bias, e))
            for e, begin, end in runs(args.ends)
        ]
        return _cat_with_zeros(parts, x, n)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.x.new_empty((args.x.shape[0], args.out_features))

    differentiable = ("x",)
    saved_meta = ("x", "bias")
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        return {"x": ops.experts_linear_dx(dy, args.ends, *args.base, args.x.shape[-1])}

    @staticmethod
    def flops(args: Any) -> int:
        return 2 * prod(args.x) * args.out_features


class ExpertsLinearDx(Op):
    name = "experts_linear_dx"
    schema = "(Tensor dy, Tensor ends, $nf4, SymInt in_features) -> Tensor"
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        dy, k = args.dy, args.in_features
        parts = [
            ops.nf4_linear_dx(dy[begin:end], *expert_base(args.base, e), k)
            for e, begin, end in runs(args.ends)
        ]
        return _cat_with_zeros(parts, dy, k)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.dy.new_empty((args.dy.shape[0], args.in_features))

    differentiable = ("dy",)
    saved_meta = ("dy",)
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        return {"dy": ops.experts_linear(dy, args.ends, *args.base, args.dy.shape[-1], None)}

    @staticmethod
    def flops(args: Any) -> int:
        return 2 * prod(args.dy) * args.in_features


class ExpertsLoraLinear(Op):
    """`ExpertsLinear` with an adapter per expert: lora_a (experts, r, in), lora_b (experts, out, r). Also
    returns h = x A^T, (rows, r), zero in rows of no expert. The base is NF4 or dense, and frozen."""

    name = "experts_lora_linear"
    schema = (
        "(Tensor x, Tensor ends, $base, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling) "
        "-> (Tensor y, Tensor h)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        x, a, b = args.x, args.lora_a, args.lora_b
        rest = args.scaling, 0.0, None, None
        parts = [
            ops.lora_linear(
                x[begin:end], *expert_base(args.base, e), _bias_of(args.bias, e), a[e], b[e], *rest
            )
            for e, begin, end in runs(args.ends)
        ]
        h = _cat_with_zeros([h for _, h in parts], empty_h(x, 0), a.shape[1])
        return _cat_with_zeros([y for y, _ in parts], x, b.shape[1]), h

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        y = args.x.new_empty((args.x.shape[0], args.lora_b.shape[1]))
        return y, empty_h(args.x, args.lora_a.shape[1])

    differentiable = ("x", "lora_a", "lora_b")
    saved_meta = ("bias", "y")
    saved_outputs = ("h",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        dx, da, db = ops.experts_lora_linear_backward(
            dy, args.x, results.h, args.ends, *args.base, args.lora_a, args.lora_b, args.scaling,
            need.x, need.lora_a, need.lora_b,
        )  # fmt: skip
        return {"x": dx, "lora_a": da, "lora_b": db}

    @staticmethod
    def flops(args: Any) -> int:
        r, out = args.lora_a[1], args.lora_b[1]
        rows, k = args.x
        return int(2 * rows * (k * out + r * (k + out)))


class ExpertsLoraLinearBackward(Op):
    """Gradients not needed have no elements; those of experts without rows are zero."""

    name = "experts_lora_linear_backward"
    schema = (
        "(Tensor dy, Tensor x, Tensor h, Tensor ends, $base, Tensor lora_a, Tensor lora_b, float scaling, "
        "bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        a, b, needs = args.lora_a, args.lora_b, (args.need_dx, args.need_da, args.need_db)
        dx, da, db = (
            empty_unless(n, t.contiguous()).zero_() for n, t in zip(needs, (args.x, a, b), strict=True)
        )
        for e, begin, end in runs(args.ends):
            of_rows = args.dy[begin:end], args.x[begin:end], args.h[begin:end]
            found = ops.lora_linear_backward(
                *of_rows, *expert_base(args.base, e), a[e], b[e], args.scaling, 0.0, None, None, *needs
            )
            places: tuple[Any, ...] = slice(begin, end), e, e
            for total, part, where in zip((dx, da, db), found, places, strict=True):
                if total.numel():
                    total[where] = part
        return dx, da, db

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dx, da = empty_unless(args.need_dx, args.x), empty_unless(args.need_da, args.lora_a)
        return dx, da, empty_unless(args.need_db, args.lora_b)

    @staticmethod
    def flops(args: Any) -> int:
        (rows, k), r, out = args.x, args.lora_a[1], args.lora_b[1]
        dh = r * out * (args.need_dx or args.need_da)
        return int(
            2 * rows * (k * (out + r) * args.need_dx + dh + r * (k * args.need_da + out * args.need_db))
        )


def runs(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of each expert that has rows. Synchronises with the device of `ends`."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if end > begin:
            yield e, begin, end
            begin = end


def _cat_with_zeros(parts: list[Tensor], like: Tensor, columns: int) -> Tensor:
    """The rows of all experts, then zeros up to the rows of `like`."""
    rest = like.shape[0] - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, like.new_zeros((rest, columns))])


def _bias_of(bias: Tensor | None, e: int) -> Tensor | None:
    return None if bias is None else bias[e]


def expert_base(base: Base, e: int) -> Base:
    """One expert's weight."""
    parts: Any = {name: t[e] for name, t in base._asdict().items() if isinstance(t, Tensor)}
    return base._replace(**parts)


@names_wrong_types
def experts_linear(
    x: Tensor, ends: Tensor, weight: HoldsPacked | PackedState, bias: Tensor | None = None
) -> Tensor:
    """Multiplies rows of x, sorted by expert, by their experts' frozen NF4 weights, and adds their biases.

    Parameters
    ----------
    x : Tensor, (rows, in_features)
        fp32, bf16 or fp16. Sums are in fp32.
    ends : Tensor, (experts,), int32
        Row after the last row of each expert, ascending: `offs` of torch's grouped_mm. Rows after the last
        end give zeros.
    weight : PackedWeight, (experts, out_features, in_features)
    bias : Tensor, (experts, out_features), optional
        Of x's dtype or fp32. Frozen.

    Returns
    -------
    Tensor, (rows, out_features), of x's dtype. Differentiable in x.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; a weight or bias that requires grad.
    """
    if not isinstance(weight, (HoldsPacked, PackedState)):
        raise ValueError(f"weight: expected a PackedWeight, got {type(weight).__name__}")
    shape, base = _experts_of(x, ends, weight)
    _check_bias(x, bias, shape)
    if base.absmax is None:
        raise ValueError("weight: expected packed values, got a PackedWeight that a write made dense")
    y: Tensor = dispatch.call("experts_linear", x, ends, *base, shape[1], bias)
    return y


@names_wrong_types
def experts_lora_linear(
    x: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """`experts_linear` with an adapter per expert, y + scaling * (x A^T) B^T, in one call.

    Parameters
    ----------
    x, ends, bias
        As `experts_linear`.
    weight : PackedWeight or Tensor, (experts, out_features, in_features)
        NF4, or dense of x's dtype. Frozen.
    lora_a : Tensor, (experts, r, in_features)
    lora_b : Tensor, (experts, out_features, r)
        fp32 or x's dtype each.
    scaling : float
        alpha / r, or alpha / sqrt(r) for rsLoRA.

    Returns
    -------
    Tensor, (rows, out_features), of x's dtype. Differentiable in x, lora_a and lora_b; gradients of experts
    without rows are zero.

    Raises
    ------
    ValueError
        As `experts_linear`, and shapes and dtypes of adapters that do not fit.
    """
    shape, base = _experts_of(x, ends, weight)
    _check_bias(x, bias, shape)
    experts, out_features, in_features = shape
    if lora_a.dim() != 3 or (lora_a.shape[0], lora_a.shape[2]) != (experts, in_features):
        raise ValueError(f"lora_a: expected shape ({experts}, r, {in_features}), got {tuple(lora_a.shape)}")
    expected = experts, out_features, lora_a.shape[1]
    if lora_b.shape != expected:
        raise ValueError(f"lora_b: expected shape {expected}, got {tuple(lora_b.shape)}")
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: expected {x.dtype} like x or float32, got {adapter.dtype}")
        if adapter.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {adapter.device}")
    y: Tensor = dispatch.call("experts_lora_linear", x, ends, *base, bias, lora_a, lora_b, float(scaling))[0]
    return y


def _experts_of(x: Tensor, ends: Tensor, weight: Weight) -> tuple[tuple[int, int, int], Base]:
    state: Any = weight._state if isinstance(weight, HoldsPacked) else weight
    packed = isinstance(state, PackedState)
    dense = state.merged_values() if packed else state
    if len(state.shape) != 3:
        expected = "(experts, out_features, in_features)"
        raise ValueError(f"weight: expected shape {expected}, got {tuple(state.shape)}")
    shape: tuple[int, int, int] = tuple(state.shape)
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("weight: expected requires_grad=False, as experts are frozen here, got True")
    if packed and dense is not None:
        dense = dense.to(x.dtype)
    elif dense is not None and dense.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype} like x, got {dense.dtype}")
    base = state.op_args if dense is None else Base(dense)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != shape[2]:
        raise ValueError(f"x: expected shape (rows, {shape[2]}), got {tuple(x.shape)}")
    if ends.shape != (shape[0],) or ends.dtype != torch.int32:
        got = f"{tuple(ends.shape)} of {ends.dtype}"
        raise ValueError(f"ends: expected shape ({shape[0]},) of torch.int32, got {got}")
    for name, tensor in (("weight", base.weight), ("ends", ends)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}")
    return shape, base


def _check_bias(x: Tensor, bias: Tensor | None, shape: tuple[int, int, int]) -> None:
    if bias is None:
        return
    if bias.shape != shape[:2]:
        raise ValueError(f"bias: expected shape {shape[:2]}, got {tuple(bias.shape)}")
    if bias.requires_grad:
        raise ValueError("bias: expected requires_grad=False, as experts are frozen here, got True")
    arguments.check_bias(x, bias[0], shape[1], x.dtype)
