"""Other families and tasks than Llama's, with every option of `patch` and its attention: encoder-decoders,
hybrids with states, latent attention, Llama 4; padding-free batches, classifiers, reward models, embeddings.
The truth is unpatched in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_families
import peft
import pytest
import torch
import transformers
from flow_checks import Calls, assert_near, layer_fallbacks
from flow_models import adapted, ids, in_fp64, llama
from installed import before
from peft_models import gradients
from rounding import FAR, ONE_STEP
from torch import Tensor, nn

import peft_kernels as pk
import testing

LAYERS = r".*\.(q|k|v|o|wi_0|wi_1|fc1|fc2|in_proj|(q|k|v|o|out|q_a|q_b|kv_b|gate|up|down)_proj)"
MAMBA = LAYERS.replace("|out", "")  # PEFT refuses adapters on out_proj
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} | {
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}
WHISPER = {
    **{"vocab_size": 100, "d_model": 32, "num_mel_bins": 8, "init_std": 0.2, "max_source_positions": 10},
    **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
       {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}  # fmt: skip


def seq2seq(name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()

    return made


def causal(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: flow_families.tiny(name, **options)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (seq2seq("T5", **T5), LAYERS),
    "mt5": (seq2seq("MT5", **T5, tie_word_embeddings=False), LAYERS),
    "whisper": (seq2seq("Whisper", **WHISPER), LAYERS),
    "falcon_h1": (causal("falcon_h1"), MAMBA),
    "bamba": (causal("bamba", attn_layer_indices=[1]), MAMBA),
    "deepseek_v2": (causal("deepseek_v2"), LAYERS),
    "deepseek_v3": (causal("deepseek_v3"), LAYERS),
    "llama4": (causal("llama4_text", attention_chunk_size=8), LAYERS),
}


def packed(name: str) -> Any:
    make, layers = MODELS[name]
    model = adapted(pk.quantize_model(make()), target_modules=layers, r=4, lora_alpha=8).eval()
    model.config.use_cache = True
    return model


def patched(model: Any) -> Any:
    return pk.patch(model)


def truth_of(model: Any) -> Any:
    wide = in_fp64(model)
    for one in wide.modules():
        if hasattr(one, "set_experts_implementation"):
            one.set_experts_implementation("eager")  # the others do not run in fp64
    return wide


def batch(name: str, dtype: torch.dtype, side: str = "right") -> dict[str, Tensor]:
    """A batch whose first row is padded and has tokens without labels."""
    tokens = ids(1, rows=2, length=9, vocabulary=100)
    there = torch.ones_like(tokens)
    there[0, slice(6, None) if side == "right" else slice(3)] = 0
    labels = tokens.masked_fill(there == 0, -100)
    if name == "whisper":
        return {"input_features": testing.tensor(2, 8, 20, seed=1).to(dtype), "labels": labels}
    return {"input_ids": tokens * there, "attention_mask": there, "labels": labels}


def assert_near_truth(got: dict[str, Tensor], model: Any, step: Callable[[Any], dict[str, Tensor]]) -> None:
    """Unpatches the model."""
    pk.unpatch(model)
    model.set_attn_implementation("sdpa")
    assert_near(got, step(truth_of(model)), FAR)


def results(name: str, model: Any) -> dict[str, Tensor]:
    """Loss, logits and gradients of a step, and generated tokens, greedily and by beam search."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    model.zero_grad()
    out = model(**batch(name, dtype))
    out.loss.backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients(model)}
    given = {key: value for key, value in batch(name, dtype, "left").items() if key != "labels"}
    for beams in (1, 3):
        tokens = model.generate(**given, max_new_tokens=5, num_beams=beams, do_sample=False)
        found[f"{beams} beams"] = tokens.double()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_family(name: str, tmp_path: Path) -> None:
    model = packed(name)
    truth = results(name, truth_of(model))
    report = patched(model)
    with Calls() as calls:
        got = results(name, model)
    assert_near(got, truth, FAR)
    assert torch.equal(got["1 beams"], truth["1 beams"]) and torch.equal(got["3 beams"], truth["3 beams"])
    assert not report.original and not layer_fallbacks(report), report.details()
    assert calls.counts["linear_cross_entropy"] and calls.fused
    masks = name in ("bamba", "falcon_h1") and before("transformers", "5.10")  # they pass one of their own
    if name not in ("t5", "mt5") and not masks:  # their attention has position biases
        assert calls.counts["attention"]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pk.quantize_model(MODELS[name][0]()), tmp_path)
    patched(again)
    with torch.no_grad():
        given = batch(name, torch.float32)
        assert_near({"logits": again(**given).logits}, {"logits": model(**given).logits})
    pk.unpatch(model)
    assert_near(results(name, model), truth, FAR)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "llama4"])
def test_padding_free_batches(name: str) -> None:
    """A row of DataCollatorWithFlattening, whose texts are separated by restarting positions only."""
    if name == "llama4" and before("transformers", "5.23"):
        pytest.skip("texts of Llama 4 see each other in this transformers")
    model = packed(name) if name != "llama" else adapted(llama("nf4"), target_modules=LAYERS).eval()
    model.config.use_cache = False
    report = patched(model)
    texts = [row[:end] for row, end in zip(ids(1, rows=3, vocabulary=100), (5, 9, 7), strict=True)]
    given = transformers.DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts])
    given = {key: value for key, value in given.items() if isinstance(value, Tensor)}

    def step(each: Any) -> dict[str, Tensor]:
        each.zero_grad()
        out = each(**given)
        out.loss.backward()
        return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients(each)}

    with Calls() as calls:
        got = step(model)
    assert calls.counts["attention"] == 2
    alone = torch.cat([model(input_ids=text[None]).logits for text in texts], 1)
    assert_near({"alone": got["logits"]}, {"alone": alone}, ONE_STEP)
    assert_near_truth(got, model, step)
    assert not report.original


def classifier(kind: Any) -> Any:
    """A Llama with a trained score head."""
    config = llama(vocab_size=100).config
    config.num_labels, config.use_cache = 1, False
    torch.manual_seed(0)
    model = pk.quantize_model(kind.from_config(config).float())
    saved = ["score"] if hasattr(model, "score") else None
    return adapted(model, target_modules=LAYERS, modules_to_save=saved).eval()


def test_rewards() -> None:
    model = classifier(transformers.AutoModelForSequenceClassification)
    assert type(model.get_base_model().score.modules_to_save["default"]) is nn.Linear, "new, and trained"
    report = patched(model)

    def step(each: Any) -> dict[str, Tensor]:
        each.zero_grad()
        chosen, rejected = (
            each(**{k: v for k, v in batch("llama", torch.float32, side).items() if k != "labels"}).logits
            for side in ("right", "left")
        )
        loss = -nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        return {"loss": loss.detach(), "rewards": chosen.detach(), **gradients(each)}

    got = step(model)
    assert any("score" in key for key in got) and not report.original
    assert_near_truth(got, model, step)


def test_embeddings() -> None:
    """Mean-pooled embeddings with in-batch negatives."""
    model = classifier(transformers.AutoModel)
    report = patched(model)

    def step(each: Any) -> dict[str, Tensor]:
        each.zero_grad()
        vectors = []
        for side in ("right", "left"):
            given = batch("llama", torch.float32, side)
            hidden = each(given["input_ids"], given["attention_mask"]).last_hidden_state
            mask = given["attention_mask"][..., None]
            vectors.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        loss = nn.functional.cross_entropy(20 * vectors[0] @ vectors[1].T, torch.arange(2))
        loss.backward()
        return {"loss": loss.detach(), "vectors": vectors[0].detach(), **gradients(each)}

    got = step(model)
    assert len(report.fused) == 14 and not report.original
    assert_near_truth(got, model, step)
