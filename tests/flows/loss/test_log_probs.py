"""Log-probabilities of rows that share prompts, and their gradients, against TRL's; fallbacks to TRL."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from flow_checks import assert_near
from flow_families import tiny
from flow_models import Tokens, adapted, ids, llama
from installed import before
from rounding import ONE_STEP
from torch import Tensor, nn

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
if before("trl", "1.15"):
    pytest.skip("the trainers of integrations.trl need TRL 1.15", allow_module_level=True)
from trl.trainer.utils import add_fused_lm_head

from peft_kernels.integrations import trl as ours
from peft_kernels.patch.block import attend as our_attention
from peft_kernels.patch.loss.trl_head import OUTPUTS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def batch(left: bool = False) -> dict[str, Tensor]:
    """Three completions for each of two prompts, padded on one or both sides; some tokens are masked."""
    tokens = ids(5, rows=6, length=24, vocabulary=100)
    seen, labels = torch.ones_like(tokens), tokens.clone()
    for i in range(6):
        tokens[i, :14] = tokens[i % 2, :14]
        start, end = (3 if left and i % 2 else 0), 21 + i % 4
        seen[i, :start], seen[i, end:] = 0, 0
        labels[i] = tokens[i]
        labels[i, : 14 if i != 4 else 16] = -100
    labels[seen == 0] = -100
    labels[3, 19] = -100
    return {"input_ids": tokens.where(seen > 0, 0), "attention_mask": seen, "labels": labels}


def install(model: Any, **options: Any) -> ours.LogProbs:
    model.requires_grad_(False)
    add_fused_lm_head(model, temperature=options.get("temperature", 1.0), outputs=("log_probs", *OUTPUTS))
    return ours.LogProbs(model, **{"never": "", "temperature": 1.0, "outputs": OUTPUTS, "head": ""} | options)


def results(run: Any, model: Any, seed: int = 7) -> dict[str, Tensor]:
    """All outputs, and the embeddings' gradient of a random sum of log-probabilities."""
    weight = model.get_input_embeddings().weight
    embedded = weight.detach().clone().requires_grad_()
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, args, _: F.embedding(args[0], embedded)
    )
    try:
        out = run()
        noise = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad((out.log_probs * noise).sum(), embedded)
    finally:
        hook.remove()
    return {name: value.detach().float() for name, value in out.items()} | {"gradient": gradient}


def both(model: Any, data: dict[str, Tensor], **options: Any) -> tuple[Any, Any, ours.LogProbs]:
    log_probs = install(model, **options)
    labels = data["labels"]
    inputs = {k: v for k, v in data.items() if k != "labels"}
    want = results(lambda: log_probs.theirs(**data, fused_lm_head=True), model)
    return results(lambda: log_probs(model, labels, inputs), model), want, log_probs


@pytest.mark.parametrize("head", ["", "TRL's"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "peft_kernels"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_log_probs(left: bool, attention: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    our_attention.register()
    if attention == our_attention.NAME:
        monkeypatch.setattr(our_attention, "sdpa_attention_forward", None)  # it is not called
    model = llama(attn_implementation=attention)
    tokens = Tokens(model)
    got, want, log_probs = both(model, batch(left), head=head, temperature=0.7)
    assert_near(got, want)
    assert not log_probs.fallbacks and tokens.shapes[-1][0] < 6


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "stablelm", "olmo2", "smollm3", "qwen3_moe"])
def test_families(family: str) -> None:
    model = tiny(family)
    got, want, log_probs = both(model, batch())
    assert_near(got, want, ONE_STEP)
    assert not log_probs.fallbacks


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "qwen3_next", "mamba", "bloom", "recurrent_gemma", "gpt_neo"]
)
def test_unsupported_families(family: str) -> None:
    """Falls back to TRL, each completion by itself, and counts the reason."""
    model = tiny(family)
    got, want, log_probs = both(model, batch())
    assert_near(got, want, ONE_STEP)
    assert list(log_probs.fallbacks.values()) == [1], log_probs.fallbacks


SCALED: dict[str, dict[str, float]] = {
    "granite": {"logits_scaling": 4.0},  # `forward` divides
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {"lm_head_multiplier": 3.0},
    "gemma2": {"final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("family", SCALED)
def test_scaled_logits(family: str) -> None:
    """TRL's values without TRL's head."""
    model = tiny(family)
    for name, value in SCALED[family].items():
        assert hasattr(model.config, name)
        setattr(model.config, name, value)
    got, want, log_probs = both(model, batch())
    assert_near(got, want, ONE_STEP)
    assert not log_probs.heads and not log_probs.head


def test_scale_unknown_to_this_trl() -> None:
    model = llama()
    add_fused_lm_head(model.requires_grad_(False))
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    log_probs = ours.LogProbs(model, never="", temperature=1.0, outputs=(), head="")
    data = batch()
    log_probs(model, data.pop("labels"), data)
    assert list(log_probs.heads) == ["unknown scaling of logits in this version of TRL"]


@pytest.mark.parametrize("on", [True, False])
def test_head_saved_with_the_adapter(on: bool) -> None:
    """Uses the trained copy or, with adapters disabled as for the reference, the original."""
    model = adapted(llama(), modules_to_save=["lm_head"]).eval()
    base = model.get_base_model()
    base.lm_head.modules_to_save["default"].weight.data *= 1.5
    with contextlib.nullcontext() if on else model.disable_adapter():
        got, want, log_probs = both(base, batch())
    assert_near(got, want)
    assert not log_probs.heads


@pytest.mark.parametrize("what", ["leak", "position", "a little"])
def test_model_with_other_results_falls_back(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial finds it; the configuration does not show it."""
    model = llama()
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if what == "leak" and kwargs["attention_mask"] is not None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"]).tril()
        if what != "leak":
            cos, _ = kwargs["position_embeddings"]
            others = model.model.rotary_emb(cos, torch.arange(cos.shape[1])[None] * 3)
            pairs = zip(kwargs["position_embeddings"], others, strict=True)
            share = 1.0 if what == "position" else 0.01
            kwargs["position_embeddings"] = tuple(own.lerp(other, share) for own, other in pairs)
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    data = batch()
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    got, want, log_probs = both(model, data)
    assert_near(got, want)
    (reason,) = log_probs.fallbacks
    assert ("completions change each other" if what == "leak" else "computes something else") in reason


def test_fallbacks_to_trl() -> None:
    model = llama()
    model.model.layers[0].self_attn.dropout = nn.Dropout(0.0)
    log_probs = install(model)
    data = batch()
    labels = data.pop("labels")
    model.train().model.layers[0].self_attn.dropout.p = 0.1
    log_probs(model, labels, data)
    with torch.no_grad():  # as for GRPO's old policy
        log_probs(model, labels, data)
    model.model.layers[0].self_attn.dropout.p = 0.0
    model.model.layers[0].self_attn.attention_dropout = 0.1  # a function, not a module
    log_probs(model, labels, data)
    model.model.layers[0].self_attn.attention_dropout = 0.0
    model.model.embed_tokens.neftune_noise_alpha = 5.0
    log_probs(model, labels, data)
    assert log_probs.fallbacks.total() == 4 and not log_probs.misfits
    model.eval()
    far = {name: value.clone() for name, value in data.items()}
    far["input_ids"][:, 0] = torch.arange(6) + 20
    log_probs(model, labels, far)
    gaps = data["attention_mask"].clone()
    gaps[:, 4] = 0
    log_probs(model, labels, data | {"attention_mask": gaps})
    log_probs(model, labels, data | {"output_hidden_states": True})
    model.config._attn_implementation = "flash_attention_2"
    assert "takes no mask" in ours._unfit_call(model, data)
    assert [reason.split()[0] for reason in log_probs.fallbacks] == ["dropout", "no", "its", "extra"]


def test_adapter_dropout_counts_only_while_enabled() -> None:
    model = adapted(llama(), lora_dropout=0.1).train()
    log_probs = install(model.get_base_model())
    data = batch()
    labels = data.pop("labels")
    with torch.no_grad():
        with model.disable_adapter():
            log_probs(model.get_base_model(), labels, data)
        assert not log_probs.fallbacks
        log_probs(model.get_base_model(), labels, data)
    assert list(log_probs.fallbacks) == ["dropout or other noise, which differs between completions"]


def test_left_padding_in_a_later_batch() -> None:
    """OPT would count positions without the mask."""
    model, data = tiny("opt"), batch(left=True)
    log_probs = install(model)
    for each in (batch(), data, batch()):
        labels = each.pop("labels")
        got = results(functools.partial(log_probs, model, labels, each), model)
        want = results(lambda: log_probs.theirs(**each, labels=labels, fused_lm_head=True), model)  # noqa: B023
        assert_near(got, want, ONE_STEP)
    ((reason, count),) = log_probs.fallbacks.items()
    assert "computes something else" in reason and count == 1


ROPES = {
    # Both compute something else for a batch of 24 tokens than for 23.
    "dynamic": {"rope_type": "dynamic", "factor": 8.0},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 23,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_length_dependent_embeddings(rope: str) -> None:
    """Batches of every length in turn, since dynamic scaling remembers the longest."""
    parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    models = [llama(max_position_embeddings=16, rope_parameters=dict(parameters)) for _ in range(2)]
    (model, stock), log_probs = models, install(models[0])
    add_fused_lm_head(stock.requires_grad_(False), outputs=("log_probs", *OUTPUTS))
    for end in (20, 24, 23, 24):
        data = {name: value[:, :end] for name, value in batch().items()}
        want = results(lambda: stock(**data, fused_lm_head=True), stock)  # noqa: B023
        labels = data.pop("labels")
        assert_near(results(functools.partial(log_probs, model, labels, data), model), want)
    assert not log_probs.fallbacks


def test_foreign_length_dependent_embeddings() -> None:
    """As in a model's own code that counts the tokens of a row."""
    model = llama(max_position_embeddings=16, rope_parameters={"rope_theta": 1e4, **ROPES["dynamic"]})

    class NTKRotaryEmbedding(type(model.model.rotary_emb)):  # type: ignore[misc]
        pass

    model.model.rotary_emb.__class__ = NTKRotaryEmbedding
    assert "NTKRotaryEmbedding is not transformers', and rope_type dynamic" in ours._unfit(model)


def test_model_with_other_results_beyond_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined rows exceed the length, the batch does not: detected in the first such batch."""
    model = llama(max_position_embeddings=28)
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> Any:
        return plain(x, position_ids * (2 if x.shape[1] > 28 else 1))

    monkeypatch.setattr(rotary, "forward", forward)
    log_probs = install(model)
    for end, count in ((20, 0), (24, 1)):
        data = {name: value[:4, :end] for name, value in batch().items()}
        want = results(lambda: log_probs.theirs(**data, fused_lm_head=True), model)  # noqa: B023
        labels = data.pop("labels")
        assert_near(results(functools.partial(log_probs, model, labels, data), model), want)
        assert log_probs.fallbacks.total() == count, log_probs.fallbacks


def test_rows_longer_than_max_positions() -> None:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "eos_token_id": 2}
    kinds = {"attention_types": [[["global"], 2]], "max_position_embeddings": 24, "bos_token_id": 1}
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes, **kinds)).eval()
    log_probs = install(model)
    short, data = {name: value[:4, :18] for name, value in batch().items()}, batch()
    log_probs(model, short.pop("labels"), short)
    assert not log_probs.fallbacks
    want = log_probs.theirs(**data, fused_lm_head=True).log_probs
    got = log_probs(model, data.pop("labels"), data).log_probs
    assert_near({"log_probs": got}, {"log_probs": want}, ONE_STEP)
    (reason,) = log_probs.fallbacks
    assert "GPTNeoForCausalLM raised" in reason


def test_trained_head_bias() -> None:
    """As set by `LoraConfig(bias="all")`."""
    model, data = tiny("phi"), batch()
    log_probs = install(model)
    model.lm_head.bias.requires_grad_()
    inputs = {name: value for name, value in data.items() if name != "labels"}
    found = []
    for run in (
        lambda: log_probs.theirs(**data, fused_lm_head=True),
        lambda: log_probs(model, data["labels"], inputs),
    ):
        found.append({"bias": torch.autograd.grad(run().log_probs.sum(), model.lm_head.bias)[0]})
    assert_near(*found, ONE_STEP)
    assert not log_probs.fallbacks


def test_separate_reference_runs_under_autocast() -> None:
    """Accelerate wraps the replaced forward; models whose weights DeepSpeed holds fall back to TRL."""
    model, seen = llama(), []
    add_fused_lm_head(model)
    trainer = types.SimpleNamespace(
        ref_model=model, is_fsdp_enabled=False, is_deepspeed_enabled=False,
        accelerator=types.SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16)),
    )  # fmt: skip
    log_probs = ours._share_for_reference(trainer)
    assert log_probs is not None
    model.model.layers[0].mlp.register_forward_hook(lambda m, _, out: seen.append(out.dtype))
    with torch.no_grad():
        assert not log_probs.reason(model)
        model(**batch(), fused_lm_head=True)
        assert set(seen) == {torch.bfloat16} and not log_probs.fallbacks
        trainer.is_deepspeed_enabled = True
        add_fused_lm_head(model)
        assert ours._share_for_reference(trainer).reason(model)


def test_nothing_to_predict() -> None:
    """A batch whose completions are all masked still has a gradient, of zeros."""
    data = batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    got, want, _ = both(llama(), data)
    assert not got["log_probs"].any() and not got["gradient"].any()
    assert got["log_probs"].shape == want["log_probs"].shape
