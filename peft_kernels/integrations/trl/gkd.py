"""TRL's trainer of generalised knowledge distillation, with a loss without logits."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor
from trl.experimental.gkd import GKDTrainer as TheirGKDTrainer

from ...patch.loss.lazy_scores import divergence
from ...patch.loss.trl_head import IGNORED

logger = logging.getLogger("peft_kernels")


class GKDTrainer(TheirGKDTrainer):
    """TRL's GKDTrainer with the divergence by `pk.linear_kl`, for labelled tokens only, if student and
    teacher are patched; otherwise TRL's runs, and a warning says so once.

    Same arguments, and up to rounding the same losses."""

    @staticmethod
    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Any = None,
    ) -> Any:
        mask = None if labels is None else labels != IGNORED
        found: Any = NotImplemented
        if reduction in ("sum", "batchmean") or num_items_in_batch is not None:
            found = divergence(student_logits, teacher_logits, mask, beta, temperature)
        if found is NotImplemented:
            say_fallback()
            return TheirGKDTrainer.generalized_jsd_loss(
                student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
            )
        if num_items_in_batch is not None:
            count = num_items_in_batch
        elif reduction == "batchmean":
            count = max(student_logits.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
        else:
            count = 1
        return found / (count.to(found.device) if isinstance(count, Tensor) else count)


@functools.cache
def say_fallback() -> None:
    """Once."""
    logger.warning(
        "GKDTrainer computes all logits: expected models whose head pk.patch makes lazy, the student and "
        "trainer.teacher_model; pk.explain says why one is not"
    )
