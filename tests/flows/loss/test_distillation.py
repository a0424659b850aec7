"""A KL divergence written by hand on the logits of two patched models, against stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_checks import assert_near
from loss_models import MODELS, VOCABULARY, batch, patched
from peft_models import gradients
from torch import Tensor, nn

IDS = batch()["input_ids"]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.log_softmax(z[:, 1:] / 1.5, dim=-1) for z in (student, teacher))
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * 1.5**2


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (z.view(-1, VOCABULARY).float().log_softmax(-1) for z in (student, teacher))
    return F.kl_div(t, s, reduction="sum", log_target=True)


def module(student: Tensor, teacher: Tensor) -> Tensor:
    return nn.KLDivLoss(reduction="mean", log_target=True)(student.log_softmax(-1), teacher.log_softmax(-1))


def with_labels(student: Tensor, teacher: Tensor) -> Tensor:
    own = F.cross_entropy(student[:, :-1].reshape(-1, VOCABULARY), IDS[:, 1:].flatten())
    return 0.5 * own + forward_kl(student, teacher)


def probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    """Reads the logits, as the next ones do."""
    return F.kl_div(student.log_softmax(-1), F.softmax(teacher, dim=-1), reduction="batchmean")


def each(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (z.log_softmax(-1) for z in (student, teacher))
    return F.kl_div(s, t, reduction="none", log_target=True)[0].sum()


def of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher, reduction="batchmean", log_target=True)


LAZY = (forward_kl, reverse_kl, module, with_labels)
READING = (probabilities, each, of_logits)


def pair(name: str) -> tuple[tuple[Any, Any], tuple[Any, Any], Any]:
    """Student and teacher, patched and stock, and the report of the patched student."""
    stock, teacher = MODELS[name](), MODELS["granite"]()
    (student, report), (ours, _) = patched(stock), patched(teacher)
    return (student, ours), (stock, teacher), report


def results(models: tuple[Any, Any], loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    student, teacher = models
    student.zero_grad()
    with torch.no_grad():
        other = teacher(input_ids=IDS).logits
    value = loss(student(input_ids=IDS).logits, other)
    value.backward()
    return {"value": value.detach(), **gradients(student)}


@pytest.mark.parametrize("loss", [*LAZY, *READING])
@pytest.mark.parametrize("name", ["llama", "gemma2", "head-nf4", "head-lora"])
def test_kl_by_hand(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    ours, stock, report = pair(name)
    assert_near(results(ours, loss), results(stock, loss))
    assert ("x by" in str(report)) == (loss in READING), report


def test_a_gradient_of_both_reads_the_logits() -> None:
    """As in R-Drop."""
    stock = MODELS["head-frozen"]()
    model, report = patched(stock)

    def both(of: Any) -> dict[str, Tensor]:
        of.zero_grad()
        forward_kl(of(input_ids=IDS).logits, of(input_ids=IDS.flip(-1)).logits).backward()
        return gradients(of)

    assert_near(both(model), both(stock))
    assert "x by kl_div" in str(report), report
