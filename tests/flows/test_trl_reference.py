"""Trainers that compute each prompt once, for policy and reference alike, against TRL's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_checks import assert_near
from flow_families import tiny
from flow_models import adapted, arguments, config, ids, llama, tokenizer, words
from torch import Tensor, nn

import peft_kernels as pk

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("TRL or datasets is not installed", allow_module_level=True)
import datasets
import trl
from trl.trainer.utils import add_fused_lm_head

from peft_kernels.integrations import scored_head
from peft_kernels.integrations import trl as ours

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 3
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Tokens:
    """Counts the tokens that a model's layers compute."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
        layer.register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape[:2])))

    @property
    def total(self) -> int:
        return sum(rows * length for rows, length in self.shapes)


def preferences() -> Any:
    """Of several lengths."""
    rows = [row for seed in range(3) for row in ids(seed, rows=4, length=24)]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": words(row[: 10 + i % 3]),
                "chosen": " " + words(row[13 : 16 + i % 4]),
                "rejected": " " + words(row[19 : 21 + i % 3]),
            }
            for i, row in enumerate(rows)
        ]
    )


def trained(
    kind: Any, trl_config: Any, folder: Path, model: Any, given: dict[str, Any], **options: Any
) -> Any:
    torch.manual_seed(3)
    made = kind(
        model=model,
        args=arguments(trl_config, folder, STEPS, **{"gradient_checkpointing": False} | options),
        processing_class=tokenizer(),
        **given,
    )
    for p in made.model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    pk.patch(made.model)
    log_probs = getattr(made, "log_probs", None)
    if log_probs is not None:
        log_probs.tried = True  # trying is no part of a step, and its tokens are not to be counted
    made.tokens = Tokens(made.model)
    torch.manual_seed(0)
    made.train()
    return made


def assert_same_logs(got: Any, want: Any) -> None:
    """Everything that was logged but times, and what the adapters have become."""
    for one, other in zip(got.state.log_history, want.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {k for k in one if "time" in k or "runtime" in k or "per_second" in k}:
            assert one[key] == pytest.approx(other[key], rel=2e-4, abs=2e-5), key
    adapters = [{n: p for n, p in each.model.named_parameters() if p.requires_grad} for each in (got, want)]
    assert_near(*adapters, bound=1e-3)


DPO_OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "several": {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.2], "ld_alpha": 0.5},
    "weighted": {"use_weighting": True, "eval_strategy": "steps", "eval_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 14},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", DPO_OPTIONS)
def test_dpo(name: str, tmp_path: Path) -> None:
    options, data = DPO_OPTIONS[name], preferences()
    given = {"train_dataset": data, "eval_dataset": data.select(range(3))}

    def run(kind: Any) -> Any:
        # A model that comes with an adapter gets a copy of it as reference; else the reference is the base.
        alone = name in ("several", "weighted")
        model = llama("nf4") if alone else adapted(llama("nf4"))
        more = {"peft_config": config()} if alone else {}
        return trained(kind, trl.DPOConfig, tmp_path, model, given | more, beta=0.05, **options)

    got, want = run(ours.DPOTrainer), run(trl.DPOTrainer)
    assert_same_logs(got, want)
    assert not got.log_probs.fallbacks
    assert got.tokens.total < 0.85 * want.tokens.total


def test_grpo(tmp_path: Path) -> None:
    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [sum(int(w[1:]) for w in text.split() if w.startswith("w")) / 100 for text in completions]

    data = datasets.Dataset.from_list(
        [{"prompt": words(row[: 9 + i % 3])} for i, row in enumerate(ids(0, rows=8, length=12))]
    )

    def run(kind: Any) -> Any:
        given = {"train_dataset": data, "reward_funcs": rewards}
        options = {"num_generations": 4, "max_completion_length": 4, "beta": 0.04, "learning_rate": 1e-4}
        # Steps that are not aligned with generation: the old policy's log-probabilities are computed too.
        options |= {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2}
        model = adapted(llama("nf4"))
        return trained(kind, trl.GRPOConfig, tmp_path, model, given, temperature=0.9, **options)

    got, want = run(ours.GRPOTrainer), run(trl.GRPOTrainer)
    assert_same_logs(got, want)
    assert not got.log_probs.fallbacks
    assert got.tokens.total < 0.85 * want.tokens.total


# Log-probabilities and gradients by themselves.


def batch(left: bool = False) -> dict[str, Tensor]:
    """Sequences of two prompts, three of each, padded on one or on both sides; some tokens do not count."""
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
    """As a trainer does."""
    model.requires_grad_(False)
    add_fused_lm_head(model, temperature=options.get("temperature", 1.0), outputs=("log_probs", *OUTPUTS))
    return ours.LogProbs(model, **{"never": "", "temperature": 1.0, "outputs": OUTPUTS, "head": ""} | options)


def results(run: Any, model: Any, seed: int = 7) -> dict[str, Tensor]:
    """All outputs, and the gradient of the embeddings for a random sum of log-probabilities."""
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
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_log_probs(left: bool, attention: str, head: str) -> None:
    model = llama(attn_implementation=attention)
    tokens = Tokens(model)
    got, want, log_probs = both(model, batch(left), head=head, temperature=0.7)
    assert_near(got, want)
    assert not log_probs.fallbacks and tokens.shapes[-1][0] < 6


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "stablelm", "olmo2", "smollm3", "qwen3_moe"])
def test_families(family: str) -> None:
    model = tiny(family)
    got, want, log_probs = both(model, batch())
    assert_near(got, want, 1e-4)
    assert not log_probs.fallbacks


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3_next", "mamba", "bloom", "recurrent_gemma"])
def test_families_that_are_not_fit(family: str) -> None:
    """The result is what TRL gives, each completion by itself, and the reason is counted."""
    model = tiny(family)
    got, want, log_probs = both(model, batch())
    assert_near(got, want, 1e-4)
    assert list(log_probs.fallbacks.values()) == [1], log_probs.fallbacks


@pytest.mark.parametrize("what", ["leak", "position"])
def test_a_model_that_computes_something_else(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by trying, though nothing in its configuration tells."""
    model = llama()
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if what == "leak" and kwargs["attention_mask"] is not None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"]).tril()
        if what == "position":
            cos, _ = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = model.model.rotary_emb(cos, torch.arange(cos.shape[1])[None] * 3)
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    data = batch()
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    got, want, log_probs = both(model, data)
    assert_near(got, want)
    (reason,) = log_probs.fallbacks
    assert ("completions change each other" if what == "leak" else "computes something else") in reason


def test_what_is_left_to_trl() -> None:
    model = llama()
    model.model.layers[0].self_attn.dropout = nn.Dropout(0.0)
    log_probs = install(model)
    data = batch()
    labels = data.pop("labels")
    model.train().model.layers[0].self_attn.dropout.p = 0.1
    log_probs(model, labels, data)
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
    assert [reason.split()[0] for reason in log_probs.fallbacks] == ["dropout,", "no", "its", "extra"]


def test_nothing_to_predict() -> None:
    """A batch whose completions were all cut off still has a gradient, of zeros."""
    data = batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    got, want, _ = both(llama(), data)
    assert not got["log_probs"].any() and not got["gradient"].any()
    assert got["log_probs"].shape == want["log_probs"].shape


@pytest.mark.parametrize("bias", [False, True])
def test_score(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against logits of all tokens at once, in fp64, with a tie and in pieces that leave a rest."""
    monkeypatch.setitem(scored_head.PIECE, "cpu", 300)
    g = torch.Generator().manual_seed(0)
    hidden, weight, shift, noise = (torch.randn(s, generator=g) for s in ((7, 16), (90, 16), (90,), (7,)))
    weight[40] = weight[41] = 3 * hidden[2]
    targets = torch.tensor([3, 0, 41, 89, 5, 6, 7])
    targets[0] = (hidden[0] @ weight.T + bias * shift).argmax()
    b = shift if bias else None
    if bias:
        shift[40] = shift[41]
    x = hidden.clone().requires_grad_()
    scores = scored_head.score(x, weight, b, targets, 0.8, OUTPUTS)
    (gradient,) = torch.autograd.grad((scores.log_probs * noise).sum(), x)
    true = hidden.double().requires_grad_()
    logits = F.linear(true, weight.double(), None if b is None else b.double()) / 0.8
    logs = logits.log_softmax(-1)
    chosen = logs.gather(-1, targets[:, None]).squeeze(-1)
    (want,) = torch.autograd.grad((chosen * noise).sum(), true, retain_graph=True)
    p = logs.exp()
    assert_near(
        {"gradient": gradient, **scores._asdict()},
        {
            "gradient": want, "log_probs": chosen, "entropy": -(p * logs).sum(-1),
            "log_sum_sq_probs": (p * p).sum(-1).log(), "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        },
    )  # fmt: skip
    assert scores.is_top1 is not None and scores.is_top1[0] and not scores.is_top1[2]
    with pytest.raises(ValueError, match="weight: expected a frozen head"):
        scored_head.score(x, weight.requires_grad_(), b, targets)
