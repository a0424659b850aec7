"""PEFT's prompt tuning and P-tuning on dense, NF4 and bitsandbytes bases, patched and not, and batches whose
rows use different virtual prompts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from flow_checks import Calls, assert_near, assert_same_numbers, language_loss, step, train
from flow_models import BASES, ids, in_fp64, llama, patched_copy, tokenizer
from installed import before
from peft_models import gradients
from prefix_models import skip_encoder_decoder
from rounding import ONE_LAYER, ONE_MODEL, ONE_STEP
from torch import Tensor

import peft_kernels as pk
import testing

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS, NEW = 5, 6
LAYERS = 14  # linear layers of the Llama
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt-random": (peft.PromptTuningConfig, {}),
    "prompt-text": (peft.PromptTuningConfig, {"prompt_tuning_init": "TEXT"}),
    "p-tuning-mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 32}),
    "p-tuning-lstm": (peft.PromptEncoderConfig, {"encoder_hidden_size": 32, **LSTM}),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(folder)
    return str(folder)


def config(method: str, words: str = "", tokens: int = TOKENS, task: str = "CAUSAL_LM") -> Any:
    kind, options = METHODS[method]
    if method == "prompt-text":
        options = {**options, "prompt_tuning_init_text": "w5 w9 w11", "tokenizer_name_or_path": words}
    return kind(task_type=task, num_virtual_tokens=tokens, **options)


def tuned(base: str, method: str, words: str = "") -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(llama(base), config(method, words)).train()


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


# One adapter, served by PEFT.


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_step_equals_stock(method: str, base: str, words: str) -> None:
    stock = tuned(base, method, words)
    model, report = patched_copy(stock)
    assert len(report.fused) == (0 if base == "dense" else LAYERS) and not report.original, report.details()
    truth = in_fp64(stock)

    def sample(i: int) -> Any:
        each = (step(one, lambda m: language_loss(m, ids(i))) for one in (model, stock, truth))
        return tuple(each)

    assert_same_numbers(sample, ONE_STEP)
    assert not any(layer.fallbacks for layer in report.layers), str(report)
    if method == "prompt-text":
        trained = stock.prompt_encoder["default"].embedding.weight
        assert torch.equal(trained, stock.word_embeddings.weight[[5, 9, 11, 5, 9]])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("method", ["prompt-random", "p-tuning-lstm"])
def test_training_learns_and_checkpointing_changes_nothing(method: str, reentrant: bool) -> None:
    plain, _ = patched_copy(tuned("nf4", method))
    model = copy.deepcopy(plain)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with Calls() as calls:
        got = step(model, lambda m: language_loss(m, ids()))
    assert calls.counts["nf4_linear"] == 2 * LAYERS, calls.counts  # recomputed in backward
    assert_near(got, step(plain, lambda m: language_loss(m, ids())))
    losses = train(model, lambda m, _: language_loss(m, ids()), steps=12, lr=0.05)
    assert losses == pytest.approx(
        train(plain, lambda m, _: language_loss(m, ids()), steps=12, lr=0.05), rel=ONE_STEP
    )
    assert losses[-1] < 0.95 * losses[0], losses


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("method", ["prompt-text", "p-tuning-mlp", "p-tuning-lstm"])
def test_saved_and_loaded_onto_a_fresh_base(method: str, base: str, words: str, tmp_path: Path) -> None:
    model = tuned(base, method, words)
    pk.patch(model)
    train(model, lambda m, i: language_loss(m, ids(i)), steps=2)
    want = logits(model.eval(), input_ids=ids(9))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * TOKENS * 64 + 200  # the prompt alone
    fresh = peft.PeftModel.from_pretrained(llama(base), tmp_path)
    kinds = {name: type(module) for name, module in fresh.named_modules()}
    untouched = logits(fresh, input_ids=ids(9))
    pk.patch(fresh)
    got = logits(fresh, input_ids=ids(9))
    assert testing.relative_error(got, want) < ONE_LAYER
    other = peft.get_peft_model(llama(base), config(method, words)).eval()
    assert testing.relative_error(logits(other, input_ids=ids(9)), want) > 1e-3, "training changed nothing"
    pk.unpatch(fresh)
    assert {name: type(module) for name, module in fresh.named_modules()} == kinds
    assert torch.equal(logits(fresh, input_ids=ids(9)), untouched)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_generating_with_a_cache_equals_peft_without(base: str) -> None:
    """PEFT 0.21 with transformers 5.24 inserts the prompt at every step if there is a cache."""
    stock = tuned(base, "prompt-random").eval()
    model, _ = patched_copy(stock)
    prompt = ids(2)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    mask = torch.ones_like(prompt)
    want = stock.generate(input_ids=prompt, attention_mask=mask, use_cache=False, **options)
    got = model.get_base_model().generate(**pk.prompts.mixed_inputs(model, prompt), **options)
    assert torch.equal(got, want[:, prompt.shape[1] :])


# Rows with different prompts.

NAMES = ["default", "long", "__base__", "default", "short"]
LENGTHS = [10, 4, 7, 1, 9]


def several(model: Any, method: str = "prompt-random", task: str = "CAUSAL_LM") -> Any:
    """Three adapters of different lengths, patched."""
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config(method, task=task))
    for name, tokens in (("long", 8), ("short", 2)):
        model.add_adapter(name, config(method, tokens=tokens, task=task))
    pk.patch(model)
    return model.eval()


def alone(model: Any, row: Tensor, name: str, **more: Any) -> Any:
    """PEFT's result for one row without padding, with the adapter or without one."""
    if name == "__base__":
        return model.get_base_model()(input_ids=row[None], **more)
    model.set_adapter(name)
    return model(input_ids=row[None], **more)


def batch(left: bool) -> tuple[Tensor, Tensor]:
    tokens, mask = ids(4, rows=len(NAMES)), torch.zeros(len(NAMES), 10, dtype=torch.long)
    for i, length in enumerate(LENGTHS):
        mask[i, 10 - length :] = 1
        if not left:
            tokens[i], mask[i] = tokens[i].roll(length), mask[i].roll(length)
    return tokens, mask


def gpt2() -> Any:
    """Learned absolute positions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    kinds = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **kinds))


def encoder(kind: str) -> Any:
    """An encoder with learned positions as a causal model: BERT's start at 0, RoBERTa's at 2."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.2}
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "is_decoder": True}
    config = getattr(transformers, f"{kind}Config")(**sizes, **kinds, **tokens)
    return transformers.AutoModelForCausalLM.from_config(config)


PADDED = pytest.mark.skipif(before("transformers", "5.2"), reason="refused: generate keeps given positions")

MODELS: dict[str, Any] = {
    "dense": llama,
    "bert": lambda: encoder("Bert"),
    "roberta-nf4": lambda: pk.quantize_model(encoder("Roberta")),
    "nf4": lambda: llama("nf4"),
    "gpt2-nf4": lambda: pk.quantize_model(gpt2()),
}


@PADDED
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("method", ["prompt-random", "p-tuning-mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_equals_its_adapter_alone(name: str, method: str, left: bool) -> None:
    model, (tokens, mask) = several(MODELS[name](), method), batch(left)
    inputs = pk.prompts.mixed_inputs(model, tokens, mask, adapter_names=NAMES)
    assert inputs["inputs_embeds"].shape == (5, TOKENS + 10, 64)
    got = logits(model.get_base_model(), **inputs)
    for i, adapter in enumerate(NAMES):
        row = tokens[i][mask[i].bool()]
        with torch.no_grad():
            want = alone(model, row, adapter).logits[0]
        assert testing.relative_error(got[i, -len(want) :], want) < ONE_MODEL, adapter
    assert not torch.allclose(got[0, -1], got[3, -1])


@PADDED
@pytest.mark.parametrize("name", MODELS)
def test_generating_from_a_mixed_batch(name: str) -> None:
    model, (tokens, mask) = several(MODELS[name]()), batch(left=True)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    inputs = pk.prompts.mixed_inputs(model, tokens, mask, adapter_names=NAMES)
    got = model.get_base_model().generate(**inputs, **options)
    for i, adapter in enumerate(NAMES):
        row = tokens[i][mask[i].bool()]
        for _ in range(NEW):
            with torch.no_grad():
                scores = alone(model, row, adapter).logits[0, -1]
            scores[2] = float("-inf")  # no end before NEW
            row = torch.cat((row, scores.argmax()[None]))
        assert got[i].tolist() == row[-NEW:].tolist(), adapter


@PADDED
def test_training_on_a_mixed_batch() -> None:
    """Each adapter's gradient comes from its own rows."""
    model, (tokens, mask) = several(llama("nf4"), "p-tuning-lstm"), batch(left=False)
    for p in model.prompt_encoder.parameters():
        p.requires_grad_(True)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, ::3] = -100
    inputs = pk.prompts.mixed_inputs(model, tokens, mask, labels, NAMES)
    model.get_base_model()(**inputs).loss.backward()
    got = gradients(model)
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for i, adapter in enumerate(NAMES):
        kept = mask[i].bool()
        if adapter != "__base__":
            model.set_adapter(adapter)
            for p in model.prompt_encoder.parameters():
                p.requires_grad_(True)
        out = alone(model, tokens[i][kept], adapter).logits[0]
        # Of the virtual tokens only the last predicts: the first token of the row.
        target = labels[i][kept]
        first = len(out) - len(target)
        rows = out[first - 1 : -1] if first else out[:-1]
        target = target if first else target[1:]
        total = total + torch.nn.functional.cross_entropy(rows, target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    (total / count).backward()
    want = gradients(model)
    assert {name.split(".")[1] for name in got} == {"default", "long", "short"}
    assert_near(got, want, ONE_STEP)


def t5(kind: str) -> Any:
    """Relative positions."""
    sizes = {"vocab_size": 128, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    )


def bart(kind: str, **options: Any) -> Any:
    """BART-like models, whose encoders count positions from the first column."""
    sizes = {"vocab_size": 128, "d_model": 64, "init_std": 0.2, "max_position_embeddings": 64}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = getattr(transformers, kind)
    return model(model.config_class(**sizes, **tokens, **options))


ENCODERS = {
    "T5": t5,
    "BartForConditionalGeneration": bart,
    "PegasusForConditionalGeneration": bart,
    "M2M100ForConditionalGeneration": bart,
}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_mixed_batch_of_an_encoder_decoder(kind: str, left: bool) -> None:
    skip_encoder_decoder()
    torch.manual_seed(0)
    model = several(pk.quantize_model(ENCODERS[kind](kind)), task="SEQ_2_SEQ_LM")
    tokens, mask = batch(left)
    labels = ids(6, rows=5, length=4)
    inputs = pk.prompts.mixed_inputs(model, tokens, mask, labels, NAMES)
    got = logits(model.get_base_model(), **inputs)
    del inputs["labels"]
    text = model.get_base_model().generate(**inputs, max_new_tokens=NEW, do_sample=False)
    for i, adapter in enumerate(NAMES):
        row = tokens[i][mask[i].bool()]
        with torch.no_grad():
            want = alone(model, row, adapter, labels=labels[i : i + 1]).logits[0]
        assert testing.relative_error(got[i], want) < ONE_MODEL, adapter
        one = model.get_base_model() if adapter == "__base__" else model
        said = one.generate(input_ids=row[None], max_new_tokens=NEW, do_sample=False)[0]
        assert text[i][: len(said)].tolist() == said.tolist(), adapter


def test_decoder_with_absolute_positions_needs_rows_of_one_length() -> None:
    model = several(bart("BartForCausalLM", is_decoder=True, is_encoder_decoder=False))
    tokens, mask = batch(left=True)
    with pytest.raises(ValueError, match=r"rows of one length.* BartForCausalLM, .* got lengths \[15, 12"):
        pk.prompts.mixed_inputs(model, tokens, mask, adapter_names=NAMES)
    mask[0, :3] = 0  # 7 tokens and 5 virtual ones, as long as 4 and 8
    inputs = pk.prompts.mixed_inputs(model, tokens[:2], mask[:2], adapter_names=NAMES[:2])
    got = logits(model.get_base_model(), **inputs)
    for i, adapter in enumerate(NAMES[:2]):
        with torch.no_grad():
            want = alone(model, tokens[i][mask[i].bool()], adapter).logits[0]
        assert testing.relative_error(got[i], want) < ONE_MODEL, adapter


def test_padded_rows_are_refused_where_generate_keeps_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.1.0")
    model, (tokens, mask) = several(llama()), batch(left=True)
    with pytest.raises(
        ValueError, match=r"rows of one length.* transformers before 5.2, .* got lengths \[15, 12"
    ):
        pk.prompts.mixed_inputs(model, tokens, mask, adapter_names=NAMES)
    assert "position_ids" not in pk.prompts.mixed_inputs(model, tokens)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"adapter_names": ["default", "other"]}, "adapter_names: expected .*, got 'other'"),
    "too-few": ({"adapter_names": ["default"]}, "adapter_names: expected one for each of 2 rows, got 1"),
    "text": ({"adapter_names": "long"}, "adapter_names: expected one for each of 2 rows, got 'long'"),
    "mask": ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: expected the shape of input_ids, \(2"),
    "labels": ({"labels": torch.ones(2, 3)}, r"labels: expected the shape of input_ids, \(2, 4\), got"),
    "ids": ({"input_ids": ids(1)[0]}, r"input_ids: expected a shape \(batch, length\), got \(10,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mismatch_is_named(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pk.prompts.mixed_inputs(several(llama()), **{"input_ids": ids(1, 2, 4)} | options)


def test_other_methods_and_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a PEFT model with prompt tuning or P-tuning, got Llama"):
        pk.prompts.mixed_inputs(llama(), ids())
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="adapter default: expected method PROMPT_TUNING or P_TUNING, got"):
        pk.prompts.mixed_inputs(peft.get_peft_model(llama(), prefix), ids())
    features = config("prompt-random", task="FEATURE_EXTRACTION")
    with pytest.raises(ValueError, match="adapter default: expected task_type CAUSAL_LM or SEQ_2_SEQ_LM"):
        pk.prompts.mixed_inputs(peft.get_peft_model(llama().model, features), ids())
