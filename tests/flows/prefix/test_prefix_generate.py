"""generate with PEFT's prefix tuning on patched models: the scores equal those of stock's forward.

PEFT 0.21 passes its prefix to generate as `past_key_values`, which transformers 5.24 ignores: stock generates
without the prefix, or raises. So a forward over all tokens scores the texts again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from flow_models import patched_copy
from installed import before
from prefix_models import TOKENS, bare, batch, prefixed
from rounding import ONE_MODEL
from torch import Tensor

import testing

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(
        before("transformers", "5.24"),
        reason="earlier releases of transformers pass caches to generate in other ways",
    ),
]

NEW = 4
STATIC = {"cache_implementation": "static", "disable_compile": True}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": STATIC,
    "no-cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static-beams": {"num_beams": 3, **STATIC},
    "no-cache-beams": {"num_beams": 3, "use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "chunked": {"prefill_chunk_size": 3},
}
CASES = [("llama", "dense"), ("llama", "nf4"), ("gpt2", "dense"), ("t5", "nf4"), ("bart", "nf4")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    family, base = request.param
    stock = prefixed(bare(family, base), projection=True).eval()
    return stock, patched_copy(stock)[0]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(11)
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "forced_eos_token_id": None}
    return model.generate(
        **inputs, **defaults | options, output_logits=True, output_scores=True, return_dict_in_generate=True
    )


def prompt(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch(model).items() if name != "labels"}


@torch.no_grad()
def scored(stock: Any, inputs: dict[str, Tensor], text: Tensor) -> Tensor:
    """Log-probabilities of each next token, (rows, NEW, vocabulary), from stock's forward over whole
    texts."""
    if stock.config.is_encoder_decoder:
        logits = stock(**inputs, decoder_input_ids=text[:, :-1]).logits
    else:
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = stock(input_ids=text, attention_mask=mask, position_ids=positions).logits[:, :-1]
    return logits[:, -NEW:].log_softmax(-1)


@pytest.mark.parametrize("mode", MODES)
def test_scores_equal_those_of_forward(pair: tuple[Any, Any], mode: str) -> None:
    stock, model = pair
    if mode == "chunked" and stock.config.is_encoder_decoder:
        pytest.skip("transformers prefills encoder-decoders in one piece")
    inputs, options = prompt(stock), MODES[mode]
    got = generate(model, inputs, **options)
    want = scored(stock, inputs, got.sequences)
    chosen = want.gather(2, got.sequences[:, -NEW:, None])[..., 0]
    if "num_beams" in options:
        assert testing.relative_error(got.sequences_scores, chosen.mean(1)) < ONE_MODEL
        return
    logits = torch.stack(got.logits, 1).log_softmax(-1)
    assert testing.relative_error(logits, want) < ONE_MODEL
    if not options.get("do_sample"):
        ends = torch.zeros_like(want)
        ends[..., stock.generation_config.eos_token_id] = -torch.inf  # forbidden by min_new_tokens
        assert torch.equal(got.sequences[:, -NEW:], (want + ends).argmax(-1))


def test_all_caches_give_the_same_beams(pair: tuple[Any, Any]) -> None:
    _, model = pair
    inputs = prompt(model)
    texts = [
        generate(model, inputs, **MODES[m]).sequences for m in ("beams", "static-beams", "no-cache-beams")
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_the_prefix_matters(pair: tuple[Any, Any]) -> None:
    _, model = pair
    got = generate(model, prompt(model)).logits[0]
    with model.disable_adapter():
        without = generate(model, prompt(model)).logits[0]
    assert testing.relative_error(without, got) > 0.01
    assert torch.equal(generate(model, prompt(model)).logits[0], got)
    assert "peft_kernels" not in model.base_model.prepare_inputs_for_generation.__func__.__module__


def patched_llama() -> Any:
    return patched_copy(prefixed(bare("llama")).eval())[0]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_returned_cache_continues(static: bool) -> None:
    """Equals one long text."""
    model, first = patched_llama(), prompt(patched_llama())
    cache = transformers.StaticCache(model.base_model.config, max_cache_len=20) if static else None
    given = {"cache": cache, "disable_compile": True} if static else {}
    turn = generate(model, first, **given)
    more = torch.tensor([[7, 8], [9, 10]])
    ids = torch.cat([turn.sequences, more], 1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, NEW + 2), value=1)
    again = {"input_ids": ids, "attention_mask": mask}
    got = generate(model, again, cache=turn.cache, disable_compile=True)
    want = generate(model, again)
    assert testing.relative_error(torch.stack(got.logits), torch.stack(want.logits)) < ONE_MODEL
    assert turn.cache.get_seq_length() == TOKENS + ids.shape[1] + NEW - 1


def test_unsupported_calls_are_refused() -> None:
    model = patched_llama()
    inputs = prompt(model)
    with model.disable_adapter():
        foreign = generate(model, inputs).cache
    ids = torch.cat([inputs["input_ids"]] * 2, 1)
    with pytest.raises(
        ValueError, match="cache: expected an empty one or one from this model, which begins with 5"
    ):
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache=foreign)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected shape \(batch, length\).*got \(2, 1, 8, 8\)"
    ):
        model.prepare_inputs_for_generation(ids[:, :8], attention_mask=torch.ones(2, 1, 8, 8))


def gemma(window: int) -> Any:
    """A model with one sliding-window layer and one full layer."""
    config = transformers.Gemma2Config(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=window, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return prefixed(transformers.Gemma2ForCausalLM(config)).eval()


def test_a_prefix_longer_than_the_window_is_refused() -> None:
    model, _ = patched_copy(gemma(window=4))
    with pytest.raises(ValueError, match="num_virtual_tokens: 5 do not fit into a sliding window of 4"):
        generate(model, prompt(model))


@pytest.mark.parametrize("mode", ["greedy", "static"])
def test_windows_shorter_than_the_text(mode: str) -> None:
    stock = gemma(window=8)
    got = generate(patched_copy(stock)[0], prompt(stock), **MODES[mode])
    want = scored(stock, prompt(stock), got.sequences)
    assert testing.relative_error(torch.stack(got.logits, 1).log_softmax(-1), want) < ONE_MODEL


def test_assisted_generation() -> None:
    model = patched_llama()
    inputs = {name: value[:1] for name, value in prompt(model).items()}
    want = generate(model, inputs).sequences
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=2).sequences, want)
