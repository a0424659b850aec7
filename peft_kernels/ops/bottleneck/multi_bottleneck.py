"""Several bottleneck adapters on one x, each for its own rows: a batch that mixes adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import dispatch
from ...core.op import Op
from ...core.wrong_types import names_wrong_types
from ..common import accumulator_dtype, empty_h, empty_unless, rows
from ..lora.dropout import new_seed
from .bottleneck import check_parameters, check_residual


class MultiBottleneck(Op):
    """`Bottleneck` with adapter i, and its own seed, in the rows whose row_group is i; rows of other groups
    are the residual. z is as wide as the widest bottleneck."""

    name = "multi_bottleneck"
    schema = (
        "(Tensor x, Tensor? residual, Tensor row_group, Tensor?[] norm_weight, Tensor?[] norm_bias, "
        "float[] norm_eps, Tensor[] down, Tensor?[] down_bias, Tensor[] up, Tensor?[] up_bias, "
        "str[] activation, float[] scaling, float[] dropout_p, Tensor?[] seed) -> (Tensor y, Tensor z)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        by_group = _ByGroup(args.row_group, len(args.down))
        x, acc, widest = by_group.sorted(args.x), accumulator_dtype(args.x.dtype), _widest(args.down)
        residual = None if args.residual is None else by_group.sorted(args.residual)
        y, z = [], []
        for i, mine in by_group.runs:
            beside = None if residual is None else residual[mine]
            if i is None:
                y.append(x[mine] if beside is None else beside)
                z.append(x.new_zeros((mine.stop - mine.start, widest), dtype=acc))
                continue
            part, bottleneck = ops.bottleneck(
                x[mine], beside, args.norm_weight[i], args.norm_bias[i], args.norm_eps[i], args.down[i],
                args.down_bias[i], args.up[i], args.up_bias[i], args.activation[i], args.scaling[i],
                args.dropout_p[i], args.seed[i],
            )  # fmt: skip
            y.append(part)
            z.append(F.pad(bottleneck, (0, widest - bottleneck.shape[1])))
        leading = args.x.shape[:-1]
        return by_group.restored(y, leading), by_group.restored(z, leading)

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        like = args.x if args.residual is None else args.residual
        return like.new_empty(like.shape), empty_h(args.x, _widest(args.down))

    differentiable = ("x", "residual", "norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias")
    saved_meta = ("residual", "down_bias", "up_bias", "y")
    saved_outputs = ("z",)

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        need_dnorm = [a or b for a, b in zip(need.norm_weight, need.norm_bias, strict=True)]
        dx, dnorm_weight, dnorm_bias, ddown, ddown_bias, dup, dup_bias = ops.multi_bottleneck_backward(
            dy, args.x, results.z, args.row_group, args.norm_weight, args.norm_bias, args.norm_eps,
            args.down, args.up, args.activation, args.scaling, args.dropout_p, args.seed,
            args.residual is None, need.x, need_dnorm, need.down, need.down_bias, need.up, need.up_bias,
        )  # fmt: skip

        def rounded(gradients: list[Tensor], biases: Sequence[Any]) -> list[Tensor | None]:
            pairs = zip(gradients, biases, strict=True)
            return [None if bias is None else gradient.to(bias.dtype) for gradient, bias in pairs]

        return {
            "x": dx,
            "residual": dy,
            "norm_weight": dnorm_weight,
            "norm_bias": rounded(dnorm_bias, args.norm_bias),
            "down": ddown,
            "down_bias": rounded(ddown_bias, args.down_bias),
            "up": dup,
            "up_bias": rounded(dup_bias, args.up_bias),
        }

    @staticmethod
    def flops(args: Any) -> int:
        """As if all rows used the largest adapter: shapes do not say how many rows each has."""
        return 2 * prod(args.x[:-1]) * max(_row_macs(args), default=0)


class MultiBottleneckBackward(Op):
    """Gradients not needed have no elements; those of biases have the accumulator dtype. adds_dy: x is also
    the residual."""

    name = "multi_bottleneck_backward"
    schema = (
        "(Tensor dy, Tensor x, Tensor z, Tensor row_group, Tensor?[] norm_weight, Tensor?[] norm_bias, "
        "float[] norm_eps, Tensor[] down, Tensor[] up, str[] activation, float[] scaling, "
        "float[] dropout_p, Tensor?[] seed, bool adds_dy, bool need_dx, bool[] need_dnorm, "
        "bool[] need_ddown, bool[] need_ddown_bias, bool[] need_dup, bool[] need_dup_bias) "
        "-> (Tensor dx, Tensor[] dnorm_weight, Tensor[] dnorm_bias, Tensor[] ddown, Tensor[] ddown_bias, "
        "Tensor[] dup, Tensor[] dup_bias)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Any, ...]:
        by_group = _ByGroup(args.row_group, len(args.down))
        dy, x, z = (by_group.sorted(t) for t in (args.dy, args.x, args.z))
        dx: list[Tensor] = []
        parameter_gradients = _zero_gradients(args)
        for i, mine in by_group.runs:
            if i is None:
                dx.append(dy[mine] if args.adds_dy else torch.zeros_like(x[mine]))
                continue
            found = ops.bottleneck_backward(
                dy[mine], x[mine], z[mine, : args.down[i].shape[0]], args.norm_weight[i], args.norm_bias[i],
                args.norm_eps[i], args.down[i], args.up[i], args.activation[i], args.scaling[i],
                args.dropout_p[i], args.seed[i], args.adds_dy, args.need_dx, args.need_dnorm[i],
                args.need_ddown[i], args.need_ddown_bias[i], args.need_dup[i], args.need_dup_bias[i],
            )  # fmt: skip
            dx.append(found[0])
            for gradients, gradient in zip(parameter_gradients, found[1:], strict=True):
                gradients[i] = gradient
        whole = by_group.restored(dx, args.x.shape[:-1]) if args.need_dx else args.x.new_empty(0)
        return whole, *parameter_gradients

    @staticmethod
    def fake(args: Any) -> tuple[Any, ...]:
        return empty_unless(args.need_dx, args.x), *_zero_gradients(args)

    @staticmethod
    def flops(args: Any) -> int:
        per_row = 0
        for i, (down, up) in enumerate(zip(args.down, args.up, strict=True)):
            through = args.need_dx or args.need_dnorm[i]
            of_dz = through or args.need_ddown[i] or args.need_ddown_bias[i]
            products = prod(up) * (args.need_dup[i] + of_dz) + prod(down) * (args.need_ddown[i] + through)
            per_row = max(per_row, products)
        return 2 * prod(args.x[:-1]) * per_row


class _ByGroup:
    """Sorts rows by the adapter that serves them; stable."""

    def __init__(self, row_group: Tensor, adapters: int) -> None:
        groups, self._order = row_group.sort(stable=True)
        firsts = torch.arange(adapters + 1, dtype=groups.dtype, device=groups.device)
        borders = torch.searchsorted(groups, firsts).tolist()
        ends = [0, *borders, groups.shape[0]]
        whose = [None, *range(adapters), None]
        runs = [(i, slice(a, b)) for i, a, b in zip(whose, ends[:-1], ends[1:], strict=True) if a < b]
        self.runs: list[tuple[int | None, slice]] = runs or [(None, slice(0, 0))]
        """Adapter and range of sorted rows; None: no adapter."""

    def sorted(self, t: Tensor) -> Tensor:
        return rows(t)[self._order]

    def restored(self, parts: Sequence[Tensor], leading: torch.Size) -> Tensor:
        """The rows of all runs in their original order."""
        whole = torch.cat(list(parts))[self._order.argsort()]
        return whole.reshape(*leading, whole.shape[-1])


def _widest(down: Sequence[Tensor]) -> int:
    return max((one.shape[0] for one in down), default=0)


def _zero_gradients(args: Any) -> tuple[list[Tensor], ...]:
    """Zero gradients of all parameters, for adapters without rows; those not needed have no elements."""
    x, acc = args.x, accumulator_dtype(args.x.dtype)

    def zeros(like: Sequence[Tensor | None], need: Sequence[bool], *shape: int, **dtype: Any) -> list[Tensor]:
        found = []
        for one, wanted in zip(like, need, strict=True):
            there = x if one is None else one
            size = (shape or there.shape) if wanted and one is not None else (0,)
            found.append(there.new_zeros(size, **dtype))
        return found

    def sums(like: Sequence[Tensor], need: Sequence[bool], dim: int) -> list[Tensor]:
        pairs = zip(like, need, strict=True)
        return [t.new_zeros(t.shape[dim] if wanted else 0, dtype=acc) for t, wanted in pairs]

    norms = args.norm_weight
    return (
        zeros(norms, args.need_dnorm),
        zeros(norms, args.need_dnorm, dtype=acc),
        zeros(args.down, args.need_ddown),
        sums(args.down, args.need_ddown_bias, 0),
        zeros(args.up, args.need_dup),
        sums(args.up, args.need_dup_bias, 0),
    )


def _row_macs(args: Any) -> list[int]:
    return [prod(down) + prod(up) for down, up in zip(args.down, args.up, strict=True)]


@dataclass(frozen=True)
class BottleneckParameters:
    """Parameters of `bottleneck`: down (r, in_features), up (out_features, r), ..."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "relu"
    scaling: float = 1.0
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float = 1e-5
    dropout_p: float = 0.0


@names_wrong_types
def multi_bottleneck(
    x: Tensor, adapters: Sequence[BottleneckParameters], row_group: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`bottleneck` with adapters[i] for the rows of group i, bit-equal to it on a CPU.

    Parameters
    ----------
    x : Tensor, (..., in_features)
        fp32, bf16 or fp16.
    adapters : sequence of BottleneckParameters
        Each may have another r, activation, scaling and dropout, norm and biases. An adapter's dropout mask
        is drawn for the rows that it serves.
    row_group : Tensor, int64 or int32, (rows,)
        The adapter of each row of x (product of its leading sizes). An index without adapter, such as -1,
        means none: the row of y is bit-equal to the residual.
    residual : Tensor, (..., out_features), optional
        Of x's dtype. By default x.

    Returns
    -------
    Tensor, (..., out_features), of x's dtype. Differentiable as `bottleneck`, in the parameters of all
    adapters; gradients of an adapter without rows are zeros.

    Raises
    ------
    ValueError
        As `bottleneck`, with the adapter's index; a row_group of another shape or dtype.
    """
    for i, one in enumerate(adapters):
        owner = f"adapters[{i}]."
        check_parameters(
            x, one.down, one.up, one.down_bias, one.up_bias, one.activation, one.norm_weight, one.norm_bias,
            one.dropout_p, owner,
        )  # fmt: skip
        check_residual(x, residual, one.up.shape[0], owner)
    if not adapters:
        check_residual(x, residual, (x if residual is None else residual).shape[-1])
    _check_groups(x, row_group)
    y: Tensor = dispatch.call(
        "multi_bottleneck",
        x,
        residual,
        row_group,
        [one.norm_weight for one in adapters],
        [one.norm_bias for one in adapters],
        [float(one.norm_eps) for one in adapters],
        [one.down for one in adapters],
        [one.down_bias for one in adapters],
        [one.up for one in adapters],
        [one.up_bias for one in adapters],
        [one.activation for one in adapters],
        [float(one.scaling) for one in adapters],
        [float(one.dropout_p) for one in adapters],
        [new_seed(x) if one.dropout_p else None for one in adapters],
    )[0]
    return y


def _check_groups(x: Tensor, row_group: Tensor) -> None:
    count = prod(x.shape[:-1])
    if row_group.shape != (count,) or row_group.dtype not in (torch.int64, torch.int32):
        got = f"{row_group.dtype} of shape {tuple(row_group.shape)}"
        raise ValueError(f"row_group: expected int64 or int32 of shape ({count},), got {got}")
    if row_group.device != x.device:
        raise ValueError(f"row_group: expected device {x.device} like x, got {row_group.device}")
