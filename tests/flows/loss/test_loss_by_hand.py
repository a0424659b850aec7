"""Losses of the user's own made of log-probabilities, on lazy logits, against stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_checks import Calls, assert_near
from loss_models import MODELS, VOCABULARY, batch, patched
from peft_models import gradients
from torch import Tensor

IDS = batch()["input_ids"]


def log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, IDS[..., None]).squeeze(-1)


def nll_loss(logits: Tensor) -> Tensor:
    rows = F.log_softmax(logits.view(-1, VOCABULARY), dim=-1)
    return F.nll_loss(rows, batch()["labels"].view(-1), reduction="none")


def take_along_dim(logits: Tensor) -> Tensor:  # as TRL's online DPO
    return torch.take_along_dim(logits[:, 2:].log_softmax(dim=-1), IDS[:, 2:, None], dim=2)


def gather_and_logsumexp(logits: Tensor) -> Tensor:
    """As TRL's `selective_log_softmax`, sequence by sequence; and a metric."""
    logits = logits[:, :-1] / 0.7
    chosen = torch.gather(logits, dim=-1, index=IDS[:, 1:, None]).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(each, dim=-1) for each in logits])


def by_sequence(logits: Tensor) -> Tensor:
    pairs = zip(logits, IDS, strict=True)
    return torch.stack([F.log_softmax(z, dim=-1).gather(-1, ids[:, None]) for z, ids in pairs])


def margin(logits: Tensor) -> Tensor:
    """The logit and lse have gradients that do not cancel."""
    return logits.gather(2, IDS[..., None]).squeeze(-1) - 0.5 * logits.logsumexp(-1)


def two_losses(logits: Tensor) -> Tensor:
    """As in TRL's ORPO and CPO."""
    chosen = F.cross_entropy(logits[:2, :-1].reshape(-1, VOCABULARY), IDS[:2, 1:].flatten())
    metric = logits[1:, :-1].detach().mean()
    return gather_and_logsumexp(logits) + chosen + metric


LOSSES = (log_softmax, nll_loss, take_along_dim, gather_and_logsumexp, by_sequence, margin, two_losses)


def results(model: Any, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    values = loss(model(input_ids=IDS).logits)
    weights = torch.linspace(-1, 1, values.numel()).view(values.shape)
    (values * weights).sum().backward()
    return {"values": values.detach(), **gradients(model)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "head-frozen", "head-nf4", "head-lora"])
def test_losses_by_hand(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    stock = MODELS[name]()
    model, report = patched(stock)
    with Calls() as calls:
        got = results(model, loss)
    assert_near(got, results(stock, loss))
    if loss is not two_losses or name != "gemma2":  # the mean of capped logits
        assert "x by" not in str(report), report
    trained = calls.counts["linear_cross_entropy_backward"]
    if name in ("head-frozen", "head-nf4") and loss is not margin:
        assert not trained, "lse has a gradient of zero"


def plain(logits: Tensor) -> Tensor:
    """What the family does not cover: several columns, another dimension, a weight of log-probabilities."""
    some = logits.gather(-1, IDS[..., None].expand(-1, -1, 2)).sum(-1)
    of_one = logits[0, 0].log_softmax(-1).gather(-1, IDS[0, :1]) + logits[0, 0].detach().mean()
    own = logits.mean(-1) + logits.mean((1, 2), keepdim=True)[..., 0] + logits.logsumexp(1).sum()
    logs = logits.log_softmax(-1).mul(2).exp()[..., 5] + logits.log_softmax(-1, dtype=torch.float64)[..., 4]
    return some + of_one + own + logits.log_softmax(1)[..., 3] + logs


def test_others_read_the_logits_once() -> None:
    stock = MODELS["llama"]()
    model, report = patched(stock)
    assert_near(results(model, plain), results(stock, plain))
    assert "1x by gather" in str(report) and str(report).count("1x by") == 1, report


def other_scale(logits: Tensor) -> Tensor:
    return logits.gather(-1, IDS[..., None]).squeeze(-1) - (logits / 2).logsumexp(-1)


def other_rows(logits: Tensor) -> Tensor:
    return logits[:, :-1].gather(-1, IDS[:, 1:, None]).squeeze(-1) - logits[:, 1:].logsumexp(-1)


@pytest.mark.parametrize("loss", [other_scale, other_rows])
@pytest.mark.parametrize("name", ["llama", "head-nf4"])
def test_lse_belongs_to_its_rows(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    stock = MODELS[name]()
    model, report = patched(stock)
    assert_near(results(model, loss), results(stock, loss))
    assert "1x by logsumexp" in str(report), report


def test_indices_out_of_range_raise() -> None:
    model, _ = patched(MODELS["llama"]())
    logits = model(input_ids=IDS).logits
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        logits.log_softmax(-1).gather(-1, torch.full_like(IDS, -100)[..., None])


@pytest.mark.parametrize("name", ["llama", "head-saved", "head-frozen"])
def test_detached_logits_outlive_a_step(name: str) -> None:
    stock = MODELS[name]()
    model, _ = patched(stock)
    kept = []
    for each in (model, stock):
        logits = each(input_ids=IDS).logits
        kept.append(logits.detach())
        logits.log_softmax(-1)[..., 0].sum().backward()
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.5).step()
    assert_near({"kept": kept[0]}, {"kept": kept[1]})
