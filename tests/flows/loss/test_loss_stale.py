"""Reading logits after a write to the head's weight or the hidden states raises; without one they have the
values of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_models import llama
from loss_models import MODELS, VOCABULARY, batch, patched
from torch import Tensor

import peft_kernels as pk

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
]
STALE = "logits: expected to be read before the head's weights or the hidden states change"


def sgd(p: Tensor) -> None:
    torch.optim.SGD([p], 1e-3).step()


def fused_adamw(p: Tensor) -> None:
    torch.optim.AdamW([p], 1e-3, fused=True).step()


def adamw_8bit(p: Tensor) -> None:
    pk.optim.AdamW8bit([p], 1e-3).step()


@torch.no_grad()
def in_place(p: Tensor) -> None:
    p[3, 1] += 1


def by_other_data(p: Tensor) -> None:
    p.data = p.data + 1


def freed(p: Tensor) -> None:
    """FSDP2 frees the weight after a layer, and later gathers another into the same tensor."""
    p.untyped_storage().resize_(0)


WRITERS = (sgd, fused_adamw, adamw_8bit, in_place, by_other_data, freed)


def head_weight(model: Any) -> Any:
    trained = [p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    return trained[-1]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["llama", "head-saved", "head-lora"])
def test_writes_to_the_head(name: str, writer: Callable[[Any], None]) -> None:
    model, _ = patched(MODELS[name]())
    out, read = model(**batch()), model(**batch())
    score = read.logits.square().mean()
    out.loss.backward()
    writer(head_weight(model))
    readers: tuple[Callable[[], Any], ...] = (
        lambda: out.logits.sum(),
        lambda: out.logits[0].detach(),
        lambda: F.cross_entropy(out.logits.view(-1, VOCABULARY), batch()["input_ids"].view(-1)),
        score.backward,
    )
    for each in readers:
        with pytest.raises(RuntimeError, match=STALE):
            each()
    assert torch.isfinite(read.logits).all(), "what was read stays"


def test_hidden_states() -> None:
    model, _ = patched(llama(vocab_size=VOCABULARY))
    hidden: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda *args: hidden.append(args[2]))
    out = model(**batch())
    hidden[0].detach()[-1, -1, -1] += 1
    with pytest.raises(RuntimeError, match=STALE):
        out.logits.sum()


@pytest.mark.parametrize("name", ["head-lora", "head-lora-nf4"])
def test_a_merge_into_the_head(name: str) -> None:
    model, _ = patched(MODELS[name]())
    out = model(**batch())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=STALE):
        out.logits.sum()


def test_logits_of_a_frozen_head_outlive_a_step() -> None:
    stock = MODELS["head-frozen"]()
    model, _ = patched(stock)
    out = model(**batch())
    out.loss.backward()
    before = model(**batch()).logits.detach()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True).step()
    assert torch.equal(out.logits, before)
    assert not torch.equal(out.logits, model(**batch()).logits)


def test_a_step_of_another_model_changes_nothing() -> None:
    (model, _), (other, _) = (patched(MODELS["llama"]()) for _ in range(2))
    out = model(**batch())
    other(**batch()).loss.backward()
    before = model(**batch()).logits.detach()
    torch.optim.AdamW(other.parameters(), 0.1, fused=True).step()
    assert torch.equal(out.logits, before)
