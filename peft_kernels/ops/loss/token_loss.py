"""Typed calls of a head with its loss: `linear_cross_entropy`, `token_log_probs`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import dispatch
from ...core.wrong_types import names_wrong_types
from .. import arguments
from ..arguments import Weight
from . import cross_entropy  # noqa: F401  (the ops)
from .head import Head

REDUCTIONS = ("mean", "sum", "none")


@names_wrong_types
def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), labels)`, computing the logits piece by piece.

    Saved for backward: for a frozen head a tensor like `hidden`, the gradient of each token's loss; for a
    trained head hidden and one value per token, and backward recomputes the logits piece by piece.

    Parameters
    ----------
    hidden : Tensor, (..., hidden_size)
        fp32, bf16 or fp16; under autocast it, and a dense weight, are rounded as F.linear does. Logits,
        probabilities and sums are in fp32.
    weight : PackedWeight or Tensor, (vocabulary, hidden_size)
        The head: NF4 (frozen), or dense of hidden's dtype, frozen or trained.
    labels : Tensor, int64, hidden.shape[:-1]
        From 0 to vocabulary - 1, or ignore_index.
    bias : Tensor, (vocabulary,), optional
        Of hidden's dtype or fp32.
    lora_a, lora_b, scaling : Tensor (r, hidden_size), Tensor (vocabulary, r), float, optional
        An adapter of the head.
    ignore_index : int
        The label of tokens without a loss.
    shift : bool
        Shifts labels by one along the last dimension, and ignores the last token, as causal language models
        are trained. Logits and hidden are not copied.
    reduction : str
        "mean" over the tokens that have a label (without any: NaN, as in torch, and gradients of 0), "sum",
        or "none": the losses in the shape of labels, 0 where ignored.
    num_items_in_batch : int or Tensor, optional
        With "mean": divisor of the sum instead of the number of tokens. Trainer passes it under gradient
        accumulation.
    logit_scale : float
        Factor of the logits, before the cap: Cohere's logit_scale, 1 / logits_scaling of Granite, or
        1 / temperature.
    softcap : float, optional
        Logits become softcap * tanh(logits / softcap), as in Gemma 2.
    label_smoothing : float
        From 0 to 1, as in torch.
    z_loss : float
        Weight of (log sum exp(logits))^2, added to the loss of each token (PaLM, section 5).

    Returns
    -------
    Tensor, fp32. Differentiable once in hidden, a dense weight, bias, lora_a and lora_b.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; an NF4 weight that requires grad; on a CPU, labels out of
        range; on a GPU, where the check would synchronise, their losses are NaN.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch: expected None with reduction {reduction!r}, got a number")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss: expected 0 or more, got {z_loss}")
    head = Head(hidden, weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
    scored, targets = _token_losses(head, labels, ignore_index, shift, label_smoothing, z_loss)
    losses = scored.losses
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses.sum()
    if num_items_in_batch is None:
        return losses.sum() / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


@names_wrong_types
def token_log_probs(
    hidden: Tensor,
    weight: Weight,
    tokens: Tensor,
    bias: Tensor | None = None,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    is_top1: bool = False,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probabilities of `tokens`, for losses such as DPO's and GRPO's, computing the logits piece by
    piece.

    Parameters are those of `linear_cross_entropy`. Optional results: entropy H of the predicted distribution
    p in nats, with a gradient, dH/dz = p (lse - H - z) of the logits z, whose error is that of the logits;
    and without gradient is_top1, whether no other token is more likely; mean_logits, the mean of the logits;
    log_sum_sq_probs, log(sum p^2).

    Returns
    -------
    Tensor, or a tuple of it and the requested results, in that order. In the shape of tokens, fp32 (is_top1:
    bool); 0 where a token is ignored.
    """
    head = Head(hidden, weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
    needs = entropy or is_top1, mean_logits, log_sum_sq_probs
    scored, _ = _token_losses(head, tokens, ignore_index, shift, needs=needs)
    log_probs = -scored.losses.view(tokens.shape)
    asked = entropy, is_top1, mean_logits, log_sum_sq_probs
    more = [t.view(tokens.shape) for t, wanted in zip(scored[1:], asked, strict=False) if wanted]
    return (log_probs, *more) if more else log_probs


def losses_and_lse(head: Head, labels: Tensor, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Losses lse - z of the logits z of labels, and lse = log sum exp of all logits, in labels' shape, fp32.
    Lse has a gradient where it is needed."""
    none = torch.iinfo(torch.int64).min  # no label is ignored
    scored, _ = _token_losses(head, labels, none, needs=(need_lse, False, False))
    return scored.losses.view(labels.shape), scored.lse.view(labels.shape)


class _Scored(NamedTuple):
    """Results per row of hidden; all but the losses are without elements where not needed."""

    losses: Tensor
    entropy: Tensor
    top: Tensor
    mean: Tensor
    squares: Tensor
    lse: Tensor


def _token_losses(
    head: Head,
    labels: Tensor,
    ignore_index: int,
    shift: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[_Scored, Tensor]:
    """Results of all rows of hidden, and their labels. `needs`: of the entropy, mean and squares."""
    head, (vocabulary, features), base = head.checked()
    hidden, bias = head.hidden, head.bias
    targets = _targets(labels, hidden, ignore_index, shift)
    _check_labels(targets, ignore_index, vocabulary)
    x = hidden.reshape(-1, features)
    bias = None if bias is None else arguments.bias_for_op(bias, x.dtype)
    numbers = float(head.logit_scale), float(head.softcap or 0.0), float(label_smoothing), float(z_loss)
    options = targets, ignore_index, *numbers
    h = None
    if head.lora_a is None:
        trained = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (base.weight, bias)
        )
        need_dx = torch.is_grad_enabled() and x.requires_grad
        if not trained and not (need_dx and head.softcap and label_smoothing):
            frozen = *base, vocabulary, bias, *options
            found = dispatch.call("linear_cross_entropy", x, *frozen, need_dx, *needs)
            return _Scored._make((*found[:2], *found[3:6], found[2])), targets
    else:
        h = float(head.scaling) * F.linear(x.to(head.lora_a.dtype), head.lora_a)
    operands = *base, vocabulary, bias, h, head.lora_b
    found = dispatch.call("linear_cross_entropy_trained", x, *operands, *options, *needs)
    return _Scored._make((*found[:2], *found[3:6], found[2])), targets


def _targets(labels: Tensor, hidden: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """The label of each row of hidden."""
    if labels.shape != hidden.shape[:-1]:
        expected = tuple(hidden.shape[:-1])
        raise ValueError(f"labels: expected shape {expected} like hidden's rows, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected device {hidden.device} like hidden, got {labels.device}")
    if shift:
        if labels.dim() == 0:
            raise ValueError("labels: expected at least 1 dimension to shift them, got 0")
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return labels.reshape(-1)


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Raises ValueError for labels out of range, on a CPU only: elsewhere the check would synchronise."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
        return
    if torch._C._are_functorch_transforms_active():
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(wrong.any()):
        got = int(labels[wrong][0])
        raise ValueError(f"labels: expected 0 to {vocabulary - 1}, or {ignore_index} to ignore, got {got}")
