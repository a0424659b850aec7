"""Attention with few products and losses with few logits are the model's own."""

from __future__ import annotations

import copy

import pytest
from flow_checks import Calls, assert_near, fallbacks, language_loss
from flow_models import ids
from models import tiny_llama
from rounding import ONE_MODEL

import peft_kernels as pk
from peft_kernels.patch import small_calls

SAMPLES, ROWS, HEADS, FEATURES, VOCABULARY = 2, 10, 4, 16, 128


@pytest.mark.parametrize(
    ("name", "limit", "op"),
    [
        ("FEW_PRODUCTS", SAMPLES * HEADS * ROWS * FEATURES * ROWS, "attention"),
        ("FEW_LOGITS", SAMPLES * ROWS * VOCABULARY, "linear_cross_entropy_trained"),
    ],
)
def test_the_limit(monkeypatch: pytest.MonkeyPatch, name: str, limit: int, op: str) -> None:
    stock = tiny_llama(head_dim=FEATURES, vocab_size=VOCABULARY)
    model = copy.deepcopy(stock)
    report = pk.patch(model)
    batch = ids(0, rows=SAMPLES, vocabulary=VOCABULARY)
    assert batch.shape == (SAMPLES, ROWS)
    for few, runs in ((limit, True), (limit + 1, False)):
        monkeypatch.setattr(small_calls, name, few)
        with Calls() as calls:
            loss = language_loss(model, batch)
        assert (calls.counts[op] > 0) == runs, dict(calls.counts)
        assert_near({"loss": loss.detach()}, {"loss": language_loss(stock, batch).detach()}, ONE_MODEL)
    assert not fallbacks(report), str(report)
