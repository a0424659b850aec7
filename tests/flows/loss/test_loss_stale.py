"""Reading logits after a write to the head's weight or the hidden states raises, for every kind of write;
without one they have the values of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_models import llama
from loss_models import MODELS, VOCABULARY, batch, patched
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
]
STALE = "logits: expected to be read before the head's weights or the hidden states change"


def fused_adamw(p: Tensor) -> None:
    torch.optim.AdamW([p], 1e-3, fused=True).step()


def by_data(p: Tensor) -> None:
    p.data[3, 1] += 1


def by_other_data(p: Tensor) -> None:
    p.data = p.data + 1


def by_numpy(p: Tensor) -> None:
    p.detach().numpy()[0, 0] = 7


def rows_swapped(p: Tensor) -> None:
    p.data[[0, 1]] = p.data[[1, 0]]


def signs(p: Tensor) -> None:
    p.data[:2].neg_()


def freed(p: Tensor) -> None:
    """FSDP2 frees the weight after a layer, and later gathers another into the same tensor."""
    p.untyped_storage().resize_(0)


WRITERS = (fused_adamw, by_data, by_other_data, by_numpy, rows_swapped, signs, freed)


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
    hidden[0].data[-1, -1, -1] += 1
    with pytest.raises(RuntimeError, match=STALE):
        out.logits.sum()


@pytest.mark.parametrize("name", ["head-lora", "head-lora-nf4"])
def test_a_merge_into_the_head(name: str) -> None:
    model, _ = patched(MODELS[name]())
    out = model(**batch())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=STALE):
        out.logits.sum()
    model.unmerge_adapter()
    if name == "head-lora-nf4":  # the original bits
        assert torch.equal(out.logits, model(**batch()).logits)


def test_logits_of_a_frozen_head_outlive_a_step() -> None:
    stock = MODELS["head-frozen"]()
    model, _ = patched(stock)
    out = model(**batch())
    out.loss.backward()
    before = model(**batch()).logits.detach()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True).step()
    assert torch.equal(out.logits, before)
    assert not torch.equal(out.logits, model(**batch()).logits)


def test_one_hash_for_each_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing costs a pass over the head's weight."""
    from peft_kernels.patch.loss import recipe

    hashed: list[Tensor] = []
    stock = recipe.bits_hash
    monkeypatch.setattr(recipe, "bits_hash", lambda t: [hashed.append(t), stock(t)][1])
    model, _ = patched(llama(vocab_size=VOCABULARY))
    out = model(**batch())
    assert [t.shape[-1] for t in hashed] == [64, 64], "hidden states and weight"
    out.loss.backward()
    assert len(hashed) == 2
    assert out.logits.isfinite().all() and len(hashed) == 4
