"""The ops on lazy logits that need no values, below autograd.

Each function takes the op, a meta tensor like the logits, their recipe, and the op's other arguments. It
returns None if values are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recipe import Recipe, Step

aten = torch.ops.aten


class LazyResult(NamedTuple):
    """Lazy logits after an op."""

    like: Tensor
    """A meta tensor, which is a view of the previous one if the logits are."""
    recipe: Recipe


def _append(
    before: Tensor, recipe: Recipe, step: Step, rows: Step | None = None, **changes: Any
) -> LazyResult:
    """`rows`: the same step on the rows of the hidden states."""
    return _append_like(step(before), recipe, step, rows, **changes)


def _append_like(like: Tensor, recipe: Recipe, step: Step, rows: Step | None, **changes: Any) -> LazyResult:
    row_steps = recipe.row_steps if rows is None else (*recipe.row_steps, rows)
    return LazyResult(like, replace(recipe, steps=(*recipe.steps, step), row_steps=row_steps, **changes))


def _same(op: Any, before: Tensor, recipe: Recipe, *, memory_format: Any = None) -> LazyResult | None:
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        return None
    options = {} if memory_format is None else {"memory_format": memory_format}
    return _append(before, recipe, lambda t: op(t, **options))


def _to(
    op: Any, before: Tensor, recipe: Recipe, *, dtype: Any = None, device: Any = None, **others: Any
) -> LazyResult | None:
    if device not in (None, recipe.call.head.hidden.device) or any(others.values()):
        return None
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return None
    return _append(before, recipe, lambda t: op(t, dtype=dtype))


def _view(op: Any, before: Tensor, recipe: Recipe, size: Sequence[int], *strides: Any) -> LazyResult | None:
    def step(t: Tensor) -> Tensor:
        found: Tensor = op(t, size, *strides)
        return found

    like = step(before)
    if like.dim() == 0 or like.shape[-1] != before.shape[-1]:
        return None
    shape = like.shape[:-1]
    return _append_like(like, recipe, step, lambda rows: rows.reshape(*shape, rows.shape[-1]))


def _unsqueeze(op: Any, before: Tensor, recipe: Recipe, dim: int) -> LazyResult | None:
    at = dim % (before.dim() + 1)
    if at == before.dim():
        return None
    return _append(before, recipe, lambda t: op(t, at), lambda rows: rows.unsqueeze(at))


def _slice(op: Any, before: Tensor, recipe: Recipe, dim: int = 0, *where: Any) -> LazyResult | None:
    at, last = dim % before.dim(), before.dim() - 1
    found = _append(
        before, recipe, lambda t: op(t, at, *where), lambda t: t if at == last else op(t, at, *where)
    )
    return found if at < last or found.like.shape == before.shape else None


def _select(op: Any, before: Tensor, recipe: Recipe, dim: int, index: int) -> LazyResult | None:
    at = dim % before.dim()
    if at == before.dim() - 1:
        return None
    return _append(before, recipe, lambda t: op(t, at, index), lambda rows: op(rows, at, index))


def _unbind(op: Any, before: Tensor, recipe: Recipe, dim: int = 0) -> list[LazyResult] | None:
    if dim % before.dim() == before.dim() - 1:
        return None
    parts = [_select(aten.select.int, before, recipe, dim, i) for i in range(before.shape[dim])]
    return [part for part in parts if part is not None]


def _index(op: Any, before: Tensor, recipe: Recipe, indices: Sequence[Tensor | None]) -> LazyResult | None:
    taken = sum(t.dim() if t is not None and t.dtype in (torch.bool, torch.uint8) else 1 for t in indices)
    if taken >= before.dim():
        return None
    kept = [None if t is None else t.clone() for t in indices]  # the caller may write to them
    shape = op(recipe.rows(recipe.call.head.hidden.detach()[..., :1]), kept).shape[:-1]
    like = torch.empty((*shape, before.shape[-1]), dtype=before.dtype, device="meta")
    return _append_like(like, recipe, lambda t: op(t, kept), lambda rows: op(rows, kept))


def _mul(op: Any, before: Tensor, recipe: Recipe, other: Any) -> LazyResult | None:
    return _scaled(op, before, recipe, other, other)


def _div(op: Any, before: Tensor, recipe: Recipe, other: Any) -> LazyResult | None:
    return _scaled(op, before, recipe, other, 1 / other if isinstance(other, (int, float)) and other else 0)


def _scaled(op: Any, before: Tensor, recipe: Recipe, other: Any, factor: Any) -> LazyResult | None:
    if recipe.is_normalized or not isinstance(factor, (int, float)) or not factor > 0:
        return None
    if recipe.outer is None:
        return _append(before, recipe, lambda t: op(t, other), inner=recipe.inner * factor)
    return _append(before, recipe, lambda t: op(t, other), outer=recipe.outer * factor)


def _tanh(op: Any, before: Tensor, recipe: Recipe) -> LazyResult | None:
    is_scaled_only = recipe.outer is None and not recipe.is_normalized
    return _append(before, recipe, op, outer=1.0) if is_scaled_only else None


def _log_softmax(op: Any, before: Tensor, recipe: Recipe, dim: int, to_float: bool) -> LazyResult | None:
    if dim % before.dim() != before.dim() - 1:
        return None
    return _append(before, recipe, lambda t: op(t, -1, to_float), is_normalized=True)


LAZY_OPS: dict[Any, Callable[..., LazyResult | list[LazyResult] | None]] = {
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.detach.default), _same),
    aten._to_copy.default: _to,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default), _view),
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.index.Tensor: _index,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.tanh.default: _tanh,
    aten._log_softmax.default: _log_softmax,
}
