"""TRL's DistillationTrainer with the divergence by `pk.linear_kl`."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer as theirs

from ...nf4.weight import PackedWeight
from ...ops.arguments import autocast_dtype
from ...ops.loss.head import Head
from ...ops.loss.linear_kl import linear_kl

NAME = "_chunked_divergence_loss"
OPTIONS = {"temperature"} | {
    f"{side}_{name}"
    for side in ("student", "teacher")
    for name in ("lm_head_bias", "logit_scale", "final_logit_softcapping")
}
"""Of TRL's function; with others TRL's runs."""
if not hasattr(theirs, NAME):
    raise ImportError(
        f"trl: expected 1.16 or later, whose DistillationTrainer has {NAME}; use TRL's own trainer"
    )


def _chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Any,
    teacher_lm_head_weight: Any,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Any = None,
    **others: Any,
) -> Any:
    """TRL's function of this name."""
    hidden = {"student": student_hidden_states, "teacher": teacher_hidden_states}
    weights = {"student": student_lm_head_weight, "teacher": teacher_lm_head_weight}
    known = (Tensor, torch.nn.Parameter, PackedWeight)
    is_known = all(type(w) in known for w in weights.values()) and others.keys() <= OPTIONS
    if student_hidden_states.device.type != "cpu" or not is_known:
        return getattr(theirs, NAME)(
            *hidden.values(), *weights.values(), completion_mask, beta, num_items_in_batch, **others
        )
    mask, temperature = completion_mask != 0, others.pop("temperature", 1.0)
    student, teacher = (_head(hidden[side], weights[side], side, others) for side in hidden)
    loss, entropy = linear_kl(
        student, teacher, mask, beta=beta, temperature=temperature, reduction="sum", entropy=True
    )
    count = mask.sum()
    return loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy, count


def _head(hidden: Tensor, weight: Any, side: str, others: dict[str, Any]) -> Head:
    scale, cap = others.get(f"{side}_logit_scale", 1.0), others.get(f"{side}_final_logit_softcapping")
    head = Head(hidden, weight, others.get(f"{side}_lm_head_bias"), logit_scale=scale, softcap=cap)
    return head.rounded() if autocast_dtype(hidden.device.type) is None else head


def _with_our_loss(function: Any) -> Any:
    """A copy of TRL's function that calls our loss instead of TRL's."""
    names = function.__globals__ | {NAME: _chunked_divergence_loss}
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class DistillationTrainer(theirs.DistillationTrainer):
    """TRL's DistillationTrainer with the divergence by `pk.linear_kl` on a CPU; elsewhere, and for sharded
    heads, TRL's own kernels run.

    Same arguments, and up to rounding the same losses and metrics."""

    _compute_loss = _with_our_loss(theirs.DistillationTrainer._compute_loss)
