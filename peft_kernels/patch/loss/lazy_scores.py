"""Losses of lazy logits, and what hand-written losses are made of, without values.

`torch.gather` reads one logit z per row. It is computed as lse - loss with that label, and `logsumexp` of the
same rows then returns lse: their difference, a log-probability, is -loss to autograd, and the head runs once.
Each function takes the recipe, then the arguments of torch's; it returns NotImplemented if values are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.arguments import autocast_dtype, no_autocast
from ...ops.loss.head import Head
from ...ops.loss.linear_kl import linear_kl
from ...ops.loss.token_loss import linear_cross_entropy, losses_and_lse
from .lazy_state import known_recipe
from .recipe import Recipe, of_head


def cross_entropy(
    recipe: Recipe,
    logits: Tensor,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    shape, dtype = logits.shape, logits.dtype
    if type(target) is not Tensor or target.dtype != torch.int64 or target.device != logits.device:
        return NotImplemented
    if len(shape) != 2 or target.shape != shape[:-1]:
        return NotImplemented
    recipe.call.check()
    head = _head(recipe, logits)
    with of_head(head):
        loss = linear_cross_entropy(
            labels=target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            **vars(head),
        )  # fmt: skip
    recipe.call.is_scored = True
    return loss.to(_loss_dtype(dtype, logits.device.type))


def _loss_dtype(logits: torch.dtype, device: str) -> torch.dtype:
    """Of F.cross_entropy here: autocast runs it in fp32."""
    return torch.float32 if autocast_dtype(device) is not None and logits.itemsize < 4 else logits


def nll_loss(recipe: Recipe, logits: Tensor, target: Any, *args: Any, **kwargs: Any) -> Any:
    return cross_entropy(recipe, logits, target, *args, **kwargs) if recipe.is_normalized else NotImplemented


def gather(recipe: Recipe, logits: Tensor, dim: Any = None, index: Any = None, **others: Any) -> Any:
    if others or type(index) is not Tensor or index.dtype != torch.int64 or index.device != logits.device:
        return NotImplemented
    shape = logits.shape
    if dim not in (-1, len(shape) - 1) or index.shape != (*shape[:-1], 1):
        return NotImplemented
    if not recipe.is_normalized and logits.dtype != torch.float32:
        return NotImplemented  # the dtype of logsumexp may be another
    if index.device.type == "cpu" and index.numel() and not 0 <= index.min() <= index.max() < shape[-1]:
        return NotImplemented  # which raises
    recipe.call.check()
    head = _head(recipe, logits)
    with of_head(head):
        found = losses_and_lse(head, index.squeeze(-1), need_lse=not recipe.is_normalized)
    recipe.call.is_scored = True
    losses, lse = (t.unsqueeze(-1) for t in found)
    if recipe.is_normalized:
        return -losses.to(logits.dtype)
    recipe.call.lse.append((recipe.kind, lse))
    return lse - losses


def take_along_dim(
    recipe: Recipe, logits: Tensor, indices: Any = None, dim: Any = None, **others: Any
) -> Any:
    return gather(recipe, logits, dim, indices, **others)


def logsumexp(recipe: Recipe, logits: Tensor, dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
    """Of rows of which `gather` has read a logit."""
    if others or recipe.is_normalized or dim not in (-1, logits.dim() - 1, (-1,), [-1]):
        return NotImplemented
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    for read, lse in recipe.call.lse:
        more = recipe.steps_after(read)
        if more is not None and lse.requires_grad >= needs_gradient and logits.dtype == torch.float32:
            for step in more:
                lse = step(lse)
            return lse if keepdim else lse.squeeze(-1)
    return NotImplemented


def mean(recipe: Recipe, logits: Tensor, *others: Any, **more: Any) -> Any:
    """Of all of them: the mean of the logits of the mean row. Without a gradient, as for a metric."""
    if others or more or (torch.is_grad_enabled() and logits.requires_grad):
        return NotImplemented
    if recipe.is_normalized or recipe.outer is not None:
        return NotImplemented
    recipe.call.check()
    head = recipe.call.head.detached(leaves=False)
    rows = recipe.rows(head.hidden).reshape(-1, head.hidden.shape[-1])
    row = rows.mean(0, keepdim=True, dtype=torch.float32)
    with no_autocast(row.device.type):
        found = replace(head, hidden=row.to(head.hidden.dtype)).output()
    return (found.float().mean() * recipe.inner).to(logits.dtype)


def kl_div(
    recipe: Recipe,
    logits: Tensor,
    target: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """Of two log-softmaxes, of which one at most has a gradient."""
    if size_average is not None or reduce is not None or not log_target or not recipe.is_normalized:
        return NotImplemented
    if reduction not in ("sum", "batchmean", "mean") or not logits.dim():
        return NotImplemented
    other = known_recipe(target)
    if other is None or not other.is_normalized:
        return NotImplemented
    student, teacher, beta = logits, target, 0.0
    if torch.is_grad_enabled() and target.requires_grad:
        student, teacher, beta = target, logits, 1.0
    found = divergence(student, teacher, None, beta, 1.0)
    if found is NotImplemented:
        return found
    dtype = _loss_dtype(torch.promote_types(logits.dtype, target.dtype), logits.device.type)
    count = {"sum": 1, "batchmean": logits.shape[0], "mean": logits.numel()}[reduction]
    return (found / count).to(dtype)


def divergence(student: Any, teacher: Any, mask: Tensor | None, beta: float, temperature: float) -> Any:
    """The sum of `linear_kl` of two lazy logits, of which the student's alone may have a gradient."""
    recipes = [recipe for t in (student, teacher) if (recipe := known_recipe(t)) is not None]
    if len(recipes) < 2 or student.shape != teacher.shape or student.device != teacher.device:
        return NotImplemented
    if torch.is_grad_enabled() and teacher.requires_grad:
        return NotImplemented
    heads = []
    for recipe, logits in zip(recipes, (student, teacher), strict=True):
        recipe.call.check()
        heads.append(_head(recipe, logits).rounded())
    with no_autocast(student.device.type):
        found = linear_kl(heads[0], heads[1], mask, beta=beta, temperature=temperature, reduction="sum")
    for recipe in recipes:
        recipe.call.is_scored = True
    return found


def _head(recipe: Recipe, logits: Tensor) -> Head:
    """The operands of the rows of logits."""
    head, cap = recipe.call.head, recipe.outer
    head = head if logits.requires_grad else head.detached(leaves=False)
    hidden = recipe.rows(head.hidden)
    return replace(head, hidden=hidden, softcap=cap, logit_scale=recipe.inner * (cap or 1.0))


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.kl_div: kl_div,
    **dict.fromkeys((torch.gather, Tensor.gather), gather),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), take_along_dim),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp), logsumexp),
    **dict.fromkeys((torch.mean, Tensor.mean), mean),
}
