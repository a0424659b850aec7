"""Log-probabilities of given tokens under a head, with the other outputs of TRL's trainers.

Uses `token_log_probs`, except for the sum of squared probabilities of DPO's weighting. That is computed in
torch on chunks of the logits: the forward, which has a chunk at hand, also computes and saves the gradient of
each log-probability by its hidden state, W^T (onehot - softmax)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ...core.gradient import AutogradFunction
from ...core.packed_state import HoldsPacked
from ...ops.arguments import autocast_dtype
from ...ops.loss.token_loss import token_log_probs

PIECE = {"cpu": 1 << 22}
"""Logits per chunk: on a CPU about the size of its last-level cache in fp32."""
LARGE_PIECE = 1 << 26
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Scores(NamedTuple):
    """Outputs of tokens, each (tokens,) in fp32, None if not selected; only `log_probs` has a gradient."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def active_head(model: Any) -> Any:
    """The layer that currently computes a model's logits: with PEFT's `modules_to_save` the active adapter's
    copy, or the original if adapters are disabled."""
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    if not active:
        return head.original_module
    copies, name = head.modules_to_save, active[0]
    return copies[name] if name in copies else head  # noqa: SIM401  (a ModuleDict has no `get`)


def score(
    hidden: Tensor,
    weight: HoldsPacked | Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Scores:
    """Log-probabilities of `targets`.

    Parameters
    ----------
    hidden
        (tokens, hidden_size).
    weight, bias
        Head: (vocabulary, hidden_size), NF4 or dense, and (vocabulary,).
    targets
        int (tokens,).
    temperature
        Divisor of logits, after the softcap.
    outputs
        Which of entropy, log_sum_sq_probs (the log of the sum of squared probabilities), mean_logits and
        is_top1 (whether no other token is more likely) to compute too.
    logit_scale, softcap
        Factor of logits, and then softcap * tanh(logits / softcap).

    Raises
    ------
    ValueError
        log_sum_sq_probs with an NF4 or trainable head.
    """
    inner, cap = logit_scale / temperature, None if softcap is None else softcap / temperature
    if "log_sum_sq_probs" not in outputs:
        # Under autocast the op casts it, chunk by chunk.
        if not isinstance(weight, HoldsPacked) and autocast_dtype(hidden.device.type) is None:
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        asked = ("entropy", "is_top1", "mean_logits")  # in the op's order
        wanted: dict[str, Any] = {name: True for name in asked if name in outputs}
        found = token_log_probs(hidden, weight, targets, bias, logit_scale=inner, softcap=cap, **wanted)
        parts = (found,) if isinstance(found, Tensor) else found
        return Scores(**dict(zip(("log_probs", *wanted), parts, strict=True)))
    if isinstance(weight, HoldsPacked):
        raise ValueError("weight: expected a dense one for log_sum_sq_probs, got one in NF4")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a frozen head, got one that requires grad")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return Scores(*_Score.apply(hidden, weight, bias, targets, inner, cap, outputs, dtype))


class _Score(AutogradFunction):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_scale: float,
        softcap: float | None,
        outputs: tuple[str, ...],
        dtype: torch.dtype,
    ) -> Any:
        training = ctx.needs_input_grad[0]
        w, x = weight.detach().to(dtype), hidden.detach().to(dtype)
        b = None if bias is None else bias.detach().to(dtype)
        count = max(1, PIECE.get(x.device.type, LARGE_PIECE) // max(1, len(w)))
        found: list[Scores] = []
        gradients: list[Tensor] = []
        for start in range(0, len(x), count):
            here = slice(start, start + count)
            scores, gradient = _piece(x[here], w, b, targets[here], logit_scale, softcap, outputs, training)
            found.append(scores)
            gradients.append(gradient)
        if training:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.empty_like(x))
        ctx.hidden_dtype = hidden.dtype
        if not found:
            found = [_piece(x, w, b, targets, logit_scale, softcap, outputs, False)[0]]
        result = [None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)]
        ctx.mark_non_differentiable(*(part for part in result[1:] if part is not None))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None].float() * gradient).to(ctx.hidden_dtype), *(None,) * 7


def _piece(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    training: bool,
) -> tuple[Scores, Tensor]:
    """All outputs of a chunk, and the gradient of each log-probability by its hidden state."""
    z = (x @ w.T if b is None else torch.addmm(b, x, w.T)).float()
    if logit_scale != 1.0:
        z *= logit_scale
    capped = None
    if softcap is not None:
        capped = (z / softcap).tanh_()
        z = capped * softcap
    highest, top = z.max(-1, keepdim=True) if z.numel() else (z.new_empty(len(z), 1), targets[:, None])
    of_target = z.gather(-1, targets[:, None])
    mean = z.mean(-1) if "mean_logits" in outputs else None
    p = (z - highest).exp_()
    total = p.sum(-1, keepdim=True)
    log_total = total.log()
    scores = Scores(
        log_probs=(of_target - highest - log_total).squeeze(-1),
        entropy=(highest + log_total).squeeze(-1) - _dot(p, z) / total.squeeze(-1)
        if "entropy" in outputs
        else None,
        log_sum_sq_probs=_dot(p, p).log() - 2 * log_total.squeeze(-1)
        if "log_sum_sq_probs" in outputs
        else None,
        mean_logits=mean,
        is_top1=(top == targets[:, None]).squeeze(-1) if "is_top1" in outputs else None,
    )
    if not training:
        return scores, x
    # onehot - softmax in fp32: the two are almost equal for likely tokens.
    p *= -1 / total
    p.scatter_add_(-1, targets[:, None], torch.ones_like(of_target))
    if capped is not None:
        p *= 1 - capped * capped
    gradient = p.to(w.dtype) @ w
    return scores, gradient if logit_scale == 1.0 else gradient * logit_scale


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product without a temporary."""
    return torch.bmm(a[:, None, :], b[:, :, None]).view(-1)
