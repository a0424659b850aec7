"""Prefixes initialised from a text, and prefixes with their reparameterisation network folded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import flow_families
import flow_models
import peft
import pytest
import torch
from flow_checks import step
from flow_models import words
from installed import before
from prefix_models import TOKENS, bare, batch, loss, prefixed
from rounding import ONE_LAYER, ONE_MODEL
from torch import Tensor

import peft_kernels as pk
import testing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**batch(model)).logits
    return found


# Folding.


@pytest.mark.parametrize(("family", "base"), [("llama", "nf4"), ("t5", "dense"), ("bart", "dense")])
def test_folding_keeps_logits(family: str, base: str, tmp_path: Path) -> None:
    """In place, and in a folder that stock PEFT reads."""
    model = prefixed(bare(family, base), projection=True).eval()
    want = logits(model)
    with pk.patched(model):
        pk.prefix.fold(model)
        assert testing.relative_error(logits(model), want) < ONE_LAYER
    assert testing.relative_error(logits(model), want) < ONE_LAYER
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["prompt_encoder.default.embedding.weight"]
    model.save_pretrained(tmp_path)
    assert not peft.PeftConfig.from_pretrained(tmp_path).prefix_projection
    loaded = peft.PeftModel.from_pretrained(bare(family, base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.prompt_encoder.requires_grad_(True)  # PEFT loads it for inference
    gradients = step(loaded, loss)
    assert gradients["prompt_encoder.default.embedding.weight"].abs().sum() > 0


def test_loaded_adapter_is_folded(tmp_path: Path) -> None:
    """PEFT saves the network's output, with a config that still describes the network."""
    model = prefixed(bare("llama"), projection=True).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bare("llama"), tmp_path)
    assert loaded.active_peft_config.prefix_projection
    loaded.prompt_encoder.requires_grad_(False)
    pk.prefix.fold(loaded)
    assert testing.relative_error(logits(loaded), logits(model)) < ONE_LAYER
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(bare("llama"), tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_one_of_several_adapters_is_folded() -> None:
    model = prefixed(bare("llama"), projection=True).eval()
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    model.add_adapter("plain", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    others = {name: copy.deepcopy(model.prompt_encoder[name].state_dict()) for name in ("default", "plain")}
    model.set_adapter("other")
    want = logits(model)
    model.set_adapter("default")
    pk.prefix.fold(model, adapter_name="other")
    for name, state in others.items():
        assert all(
            torch.equal(state[key], value) for key, value in model.prompt_encoder[name].state_dict().items()
        )
    assert model.peft_config["default"].prefix_projection
    model.set_adapter("other")
    assert testing.relative_error(logits(model), want) < ONE_LAYER
    with pytest.raises(ValueError, match="expected an adapter with prefix_projection=True, got plain"):
        pk.prefix.fold(model, "plain")
    with pytest.raises(ValueError, match="adapter_name: expected one of default, other, plain, got none"):
        pk.prefix.fold(model, "none")


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a PeftModel, got a LlamaForCausalLM"):
        pk.prefix.fold(bare("llama"))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"expected an adapter of prefix tuning, got .* of PROMPT_TUNING"):
        pk.prefix.fold(peft.get_peft_model(bare("llama"), config))


# Initialisation from a text.

TEMPLATE = (
    "{% for m in messages %}w3 {{ 'w4' if m.role == 'system' else 'w5' }} {{ m.content }} w6{% endfor %}"
)


def tokenizer() -> Any:
    made = flow_models.tokenizer()
    made.chat_template = TEMPLATE
    return made


def assert_logits_follow(model: Any, ids: list[int]) -> None:
    """Checks that the logits equal the base's after a text of these tokens."""
    assert len(ids) == model.active_peft_config.num_virtual_tokens
    tokens = flow_models.ids(4, rows=2, length=7, vocabulary=100)
    base = model.get_base_model()
    was, text = model.training, torch.tensor([ids]).expand(2, -1)
    model.eval()
    with torch.no_grad():
        want = base(input_ids=torch.cat([text, tokens], 1)).logits[:, len(ids) :]
        got = model(input_ids=tokens).logits
    model.train(was)
    assert testing.relative_error(got, want) < ONE_MODEL


FROM_TEXT = pytest.mark.skipif(before("peft", "0.19"), reason="refused: PEFT before 0.19 sets no prefix")


@FROM_TEXT
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("family", "base"), [("llama", "dense"), ("llama", "nf4"), ("gpt2", "dense")])
def test_prefix_from_text_equals_that_text(family: str, base: str, patched: bool) -> None:
    """In training mode, whose dropout and checkpointing must not affect the prefix."""
    model = prefixed(bare(family, base))
    if patched:
        pk.patch(model)
        model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    ids = [17, 23, 5, 99, 41]
    pk.prefix.init_from_text(model, tokenizer(), words(ids))
    assert [module.training for module in model.modules()] == modes
    model.gradient_checkpointing_disable()
    assert_logits_follow(model, ids)
    assert step(model, loss)["prompt_encoder.default.embedding.weight"].abs().sum() > 0


@FROM_TEXT
def test_texts_are_repeated_or_cut_and_messages_use_the_template() -> None:
    model = prefixed(bare("llama"))
    model.add_adapter("other", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    pk.prefix.init_from_text(model, tokenizer(), words([17, 23]))
    assert_logits_follow(model, [17, 23, 17, 23, 17])
    pk.prefix.init_from_text(model, tokenizer(), words([7, 8, 9, 10, 11, 12, 13]), adapter_name="other")
    assert_logits_follow(model, [17, 23, 17, 23, 17])
    model.set_adapter("other")
    assert_logits_follow(model, [7, 8, 9, 10])
    pk.prefix.init_from_text(model, tokenizer(), [{"role": "system", "content": "w50"}])
    assert_logits_follow(model, [3, 4, 50, 6])


@FROM_TEXT
def test_bad_texts_are_refused() -> None:
    model = prefixed(bare("llama"), projection=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected a plain prefix, got default with prefix_projection=True"):
        pk.prefix.init_from_text(model, tokenizer(), "w17")
    pk.prefix.fold(model)
    pk.prefix.init_from_text(model, tokenizer(), words([17] * TOKENS))
    assert before.keys() != model.state_dict().keys()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="text: expected one that has tokens, got ''"):
        pk.prefix.init_from_text(model, tokenizer(), "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected a decoder-only model, got T5ForConditional"):
        pk.prefix.init_from_text(prefixed(bare("t5")), tokenizer(), "w17")
    gpt = prefixed(flow_families.tiny("openai-gpt"))
    with pytest.raises(ValueError, match="expected one that returns its keys and values, got OpenAIGPT"):
        pk.prefix.init_from_text(gpt, tokenizer(), "w17")
