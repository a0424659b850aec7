"""The loss without logits has the dtype of stock's, in every family and under autocast, and an error like
fp32."""

from __future__ import annotations

from typing import Any

import flow_families
import pytest
import torch
import torch.nn.functional as F
import transformers
from flow_models import ids
from loss_models import MODELS, VOCABULARY, batch, patched
from torch import Tensor
from transformers.models.auto import modeling_auto as known

import peft_kernels as pk

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, tuple[Any, Any]] = {
    "causal": (transformers.AutoModelForCausalLM, known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (transformers.AutoModelForMaskedLM, known.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
CASES = [(kind, name) for kind, (_, names) in KINDS.items() for name in flow_families.families(names)]
MODES = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16, "bf16": None}


def loss_of(model: Any, autocast: torch.dtype | None) -> Tensor:
    tokens = ids(1, rows=2, length=9, vocabulary=VOCABULARY)
    with torch.autocast("cpu", autocast, enabled=autocast is not None), torch.no_grad():
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


@pytest.mark.parametrize("kind,name", CASES)
def test_dtype_is_stock_s(kind: str, name: str) -> None:
    options = {"decoder_start_token_id": 1} if kind == "seq2seq" else {}
    try:
        model = flow_families.tiny(name, KINDS[kind][0], **options)
    except Exception as error:  # sizes that depend on each other
        pytest.skip(f"{kind} {name}: stock's model raises {error!r:.90}")
    compared = 0
    for dtype in MODES.values():
        model = model.bfloat16() if dtype is None else model
        try:
            want = loss_of(model, dtype)
        except Exception:  # some families do not run in every dtype
            continue
        with pk.patched(model, ("qkv", "attention", "norms", "residuals", "mlp")):
            got = loss_of(model, dtype)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02, equal_nan=True)
        compared += 1
    if not compared:
        pytest.skip(f"{kind} {name}: stock's model raises in every dtype")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_dtype_of_an_own_loss(mode: str, reduction: str) -> None:
    """A sum in fp16 would be inf."""
    stock = MODELS["t5"]().to(torch.bfloat16 if MODES[mode] is None else torch.float32)
    stock.lm_head.weight.data *= 8
    model, report = patched(stock)
    losses = []
    for each in (model, stock):
        with torch.autocast("cpu", MODES[mode], enabled=MODES[mode] is not None):
            logits = each(**batch()).logits.view(-1, VOCABULARY)
            losses.append(F.cross_entropy(logits, batch()["labels"].view(-1), reduction=reduction))
    assert losses[0].dtype == losses[1].dtype and bool(losses[0].isfinite().all())
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
    assert not report.losses[0].record.facts.reads


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_error_of_the_loss_alone(name: str) -> None:
    """Over seeds, from the same hidden states: not more than that of stock, which rounds each logit."""
    stock = MODELS[name]()
    model, _ = patched(stock)
    head = stock.get_output_embeddings()
    hidden: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    errors: dict[str, list[Tensor]] = {"ours": [], "stock": []}
    for seed in range(8):
        tokens = ids(seed, rows=3, length=12, vocabulary=VOCABULARY)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            losses = {"ours": model(input_ids=tokens, labels=tokens).loss}
            losses["stock"] = stock(input_ids=tokens, labels=tokens).loss
        bias = None if head.bias is None else head.bias.bfloat16().double()
        logits = F.linear(hidden.pop().bfloat16().double(), head.weight.bfloat16().double(), bias)
        shift = int(name == "gpt2")
        pairs = logits[:, : logits.shape[1] - shift].flatten(0, 1), tokens[:, shift:].flatten()
        for side, loss in losses.items():
            errors[side].append((loss.double() - F.cross_entropy(*pairs)).abs())
    assert sum(errors["ours"]) <= sum(errors["stock"]), errors
