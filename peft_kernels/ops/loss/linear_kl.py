"""The divergence of a student's predictions from a teacher's, computing the logits of both some rows at a
time.

With ls and lt the log-softmax of both logits, each divided by the temperature, ps and pt their exponentials,
and m = log((1 - beta) ps + beta pt), the divergence of a token and its gradient in the student's logits are

    beta = 0 (forward KL):   sum pt (lt - ls)                            ps - pt
    beta = 1 (reverse KL):   K = sum ps (ls - lt)                        ps (ls - lt - K)
    between:                 beta sum pt (lt - m) + (1 - beta) K,        (1 - beta) ps (ls - m - K)
                             K = sum ps (ls - m)

as TRL's GKDTrainer, after On-Policy Distillation of Language Models (Agarwal et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # the public one imports Dynamo at once

from ...core.gradient import AutogradFunction, first_order_only
from ...core.wrong_types import names_wrong_types
from ..arguments import no_autocast
from .head import Head
from .token_loss import REDUCTIONS

PIECE = 1 << 23
"""Logits of each head at a time."""
BLOCK = 1 << 18
"""Logits whose intermediate results stay in a core's cache."""


@names_wrong_types
@_disable_dynamo  # in a compiled function it runs as it is, between graphs
def linear_kl(
    student: Head,
    teacher: Head | Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divergence of a student's predictions from a teacher's, computing the logits of both piece by piece.

    Saved for backward: for a frozen student's head a tensor like its hidden states, the gradient of each
    token's divergence; for a trained one both heads' hidden states, and backward recomputes the logits.

    Parameters
    ----------
    student : Head
        Hidden states (..., hidden_size) and the head, frozen or trained, dense or NF4.
    teacher : Head or Tensor
        Another head, whose hidden size may differ, or its logits (..., vocabulary). The leading sizes are the
        student's. It gets no gradient.
    mask : Tensor, bool, (...), optional
        The tokens that count. Others cost nothing.
    beta : float
        0: forward KL(teacher || student). 1: reverse KL(student || teacher). Between them: the generalised
        Jensen-Shannon divergence with the mixture beta teacher + (1 - beta) student.
    temperature : float
        Divides both logits. Gradients are not multiplied by its square.
    reduction : str
        "mean" over the tokens that count (without any: NaN), "sum", or "none": the divergences in the shape
        of mask, 0 where it is False.
    entropy : bool
        Also returns the student's entropies in nats, reduced in the same way, without a gradient.

    Returns
    -------
    Tensor, or with entropy two, fp32. Differentiable once in the student's hidden states, dense weight, bias,
    lora_a and lora_b. Logits are rounded to hidden's dtype, as a model's; what follows is in fp32, with an
    error of about that of a logit.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, got {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    shape = student.hidden.shape[:-1]
    student, vocabulary = _checked(student, "student")
    if isinstance(teacher, Head):
        _check_teacher("teacher.hidden", teacher.hidden, teacher.weight.shape[0], student, vocabulary)
        teacher = _checked(teacher, "teacher")[0]
    else:
        _check_teacher("teacher", teacher, teacher.shape[-1], student, vocabulary)
        teacher = Head(teacher, IDENTITY)
    teacher = teacher.detached(leaves=False)
    if not torch.is_grad_enabled():
        student = student.detached(leaves=False)
    student, teacher = (replace(one, hidden=_rows(one.hidden, mask, shape)) for one in (student, teacher))
    how = Divergence(float(beta), float(temperature), entropy)
    with no_autocast(student.hidden.device.type):
        found: list[Tensor] = _LinearKl.apply(how, student, teacher, *student.tensors.values())

    def reduced(t: Tensor) -> Tensor:
        if reduction != "none":
            return t.sum() if reduction == "sum" else t.mean()
        return t.view(shape) if mask is None else t.new_zeros(shape).masked_scatter(mask, t)

    return (reduced(found[0]), reduced(found[1])) if entropy else reduced(found[0])


def _checked(head: Head, name: str) -> tuple[Head, int]:
    """The head as autocast rounds it, a dense weight too, and its vocabulary."""
    try:
        checked, (vocabulary, _), _ = head.checked()
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    return checked.rounded(), vocabulary


def _check_teacher(name: str, given: Tensor, words: int, student: Head, vocabulary: int) -> None:
    rows, device = student.hidden.shape[:-1], student.hidden.device
    if given.shape[:-1] != rows:
        sizes = ", ".join(map(str, rows))
        raise ValueError(f"{name}: expected rows ({sizes}) like the student's, got {tuple(given.shape[:-1])}")
    if words != vocabulary:
        raise ValueError(f"teacher: expected a vocabulary of {vocabulary} like the student's, got {words}")
    if given.device != device:
        raise ValueError(f"{name}: expected device {device} like the student, got {given.device}")


def _rows(t: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """The rows that count."""
    if mask is None:
        return t.reshape(-1, t.shape[-1])
    if mask.shape != shape or mask.dtype != torch.bool:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"mask: expected torch.bool of shape {tuple(shape)}, got {got}")
    return t[mask]


class Divergence(NamedTuple):
    """Of rows of logits."""

    beta: float
    temperature: float
    needs_entropy: bool

    def of(
        self, student: Head, teacher: Head, outputs: tuple[Tensor, Tensor], dy: Tensor | None, need: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The divergence of each row and the student's entropy, (2, rows) fp32, and if needed the gradient
        with respect to the student's output, given `dy` of each row's divergence, by default 1."""
        rows = max(BLOCK // max(outputs[0].shape[1], 1), 1)
        found = outputs[0].new_zeros(2, len(outputs[0]), dtype=torch.float32)
        d = torch.empty_like(outputs[0]) if need else None
        for begin in range(0, len(outputs[0]), rows):
            at = slice(begin, begin + rows)
            ls, slope = self._log_softmax(outputs[0][at], student)
            ps = ls.exp()
            if self.needs_entropy:
                found[1, at] = -(ls * ps).sum(-1)
            found[0, at], of_logits = self._of_logs(ls, ps, self._log_softmax(outputs[1][at], teacher)[0])
            if dy is not None:
                of_logits.mul_(dy[at, None])
            if d is not None:
                d[at] = of_logits.mul_(slope)
        return found, d

    def _log_softmax(self, output: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
        """Of a head's output, and the derivative of its logits, divided by the temperature, in it."""
        slope: Tensor | float = head.logit_scale / self.temperature
        if head.softcap is None:
            return (output.float() * slope).log_softmax(-1), slope
        capped = torch.tanh(output.float() * (head.logit_scale / head.softcap))
        slope = (1 - capped * capped) * slope
        return (capped * (head.softcap / self.temperature)).log_softmax(-1), slope

    def _of_logs(self, ls: Tensor, ps: Tensor, lt: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence and its gradient in the student's logits. Overwrites its arguments."""
        if self.beta == 0:
            pt = lt.exp()
            found = lt.sub_(ls).mul_(pt).sum(-1)
            return found, ps.sub_(pt)
        mixture = lt
        of_teacher: Tensor | float = 0.0
        if self.beta < 1:
            pt = lt.exp()
            tiny = torch.finfo(pt.dtype).tiny  # 0 log 0 is 0
            mixture = torch.lerp(ps, pt, self.beta).clamp_(min=tiny).log_()
            of_teacher = self.beta * lt.sub_(mixture).mul_(pt).sum(-1)
        share = 1.0 if self.beta == 1 else 1 - self.beta
        gap = ls.sub_(mixture)
        of_student = (gap * ps).sum(-1)
        return of_teacher + share * of_student, gap.sub_(of_student[:, None]).mul_(ps.mul_(share))


IDENTITY: Any = object()
"""The weight of a head whose hidden states are its logits."""


class _LinearKl(AutogradFunction):
    """Of rows: divergences and entropies. `tensors` are the student's."""

    @staticmethod
    def forward(
        ctx: Any, how: Divergence, student: Head, teacher: Head, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, *rest = tensors
        ctx.recomputes = any(t.requires_grad for t in rest)
        found = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        dx = torch.empty_like(hidden)
        for at in _pieces(student):
            found[:, at], gradients = _piece(how, student, teacher, at, None, not ctx.recomputes)
            if "hidden" in gradients:
                dx[at] = gradients["hidden"]
        if ctx.recomputes:
            ctx.how, ctx.student, ctx.teacher = how, _without_tensors(student), _without_tensors(teacher)
            ctx.save_for_backward(*tensors, *teacher.tensors.values())
        else:
            ctx.save_for_backward(dx)
        divergence, entropy = found
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        return None, None, None, *first_order_only("linear_kl", _LinearKl.gradients, ctx, dy)

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
        saved, count = ctx.saved_tensors, len(ctx.needs_input_grad) - 3
        if not ctx.recomputes:
            return [(saved[0] * dy[:, None]).to(saved[0].dtype)] + [None] * (count - 1)
        student, teacher = (
            replace(head, **dict(zip(names, tensors, strict=True)))
            for (head, names), tensors in ((ctx.student, saved[:count]), (ctx.teacher, saved[count:]))
        )
        trained = {name: t for name, t in student.tensors.items() if t.requires_grad}
        sums = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in trained.items()}
        for at in _pieces(student):
            for name, gradient in _piece(ctx.how, student, teacher, at, dy[at], True)[1].items():
                (sums[name][at] if name == "hidden" else sums[name]).add_(gradient)
        return [sums[name].to(t.dtype) if name in sums else None for name, t in student.tensors.items()]


def _without_tensors(head: Head) -> tuple[Head, list[str]]:
    """The head without its tensors, which autograd saves, and their names."""
    none: Any = dict.fromkeys(head.tensors)
    return replace(head, **none), list(none)


def _pieces(student: Head) -> Iterator[slice]:
    rows = max(PIECE // max(student.weight.shape[0], 1), 1)
    return (slice(begin, begin + rows) for begin in range(0, len(student.hidden), rows))


def _piece(
    how: Divergence, student: Head, teacher: Head, at: slice, dy: Tensor | None, need: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Results of some rows, and, if needed, the gradients of those operands of the student that require
    them."""
    wanted = [name for name, t in student.tensors.items() if need and t.requires_grad]
    part = replace(student.detached(leaves=need), hidden=student.hidden[at].detach())
    part.hidden.requires_grad_("hidden" in wanted)
    with torch.set_grad_enabled(need):
        output = part.output()
    hidden = teacher.hidden[at]
    other = hidden if teacher.weight is IDENTITY else replace(teacher, hidden=hidden).output()
    found, d = how.of(student, teacher, (output.detach(), other), dy, bool(wanted))
    leaves = [part.tensors[name] for name in wanted]
    gradients = torch.autograd.grad(output, leaves, d) if wanted else ()
    return found, dict(zip(wanted, gradients, strict=True))
