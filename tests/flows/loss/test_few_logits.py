"""Logits of a few rows, as in generation: the op's GEMM with the head's dense weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from flow_models import llama
from loss_models import VOCABULARY

import peft_kernels as pk
import testing

pytestmark = pytest.mark.skipif(
    testing.unavailable("cpu") is not None, reason=f"back end cpu: {testing.unavailable('cpu')}"
)
OP = "multi_lora_linear"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return llama(vocab_size=VOCABULARY).eval()


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_generation(model: Any, op_counts: Counter[str]) -> None:
    stock = model.generate(ids(2, 4), max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model(ids(2, 4)).logits
    pk.patch(model)
    assert torch.equal(model.generate(ids(2, 4), max_new_tokens=5, do_sample=False, pad_token_id=0), stock)
    assert op_counts[OP] == 5
    torch.testing.assert_close(model(ids(2, 4)).logits, expected)
    assert op_counts[OP] == 6


@pytest.mark.parametrize("case", ["many", "gradient", "autocast", "unpatched"])
def test_fallbacks_to_the_forward_of_the_head(model: Any, op_counts: Counter[str], case: str) -> None:
    pk.patch(model)
    given = ids(3, 3) if case == "many" else ids(2, 4)
    if case == "unpatched":
        pk.unpatch(model)
    with torch.set_grad_enabled(case == "gradient"), torch.autocast("cpu", enabled=case == "autocast"):
        logits = model(given).logits
    assert op_counts[OP] == 0 and logits.requires_grad == (case == "gradient")


@torch.no_grad()
def test_bits_equal_the_op_s(model: Any) -> None:
    pk.patch(model)
    head, x = model.lm_head, testing.tensor(2, 4, 64)
    (expected,) = pk.multi_lora_linear(x, [pk.AdaptedLinear(head.weight)])
    assert torch.equal(head(x), expected)
