"""`patch(without=...)`, and what the report of a model says of its parts."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

import peft_kernels as pk
from peft_kernels import host_memory
from peft_kernels.patch import fused

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

PARTS = ("layers", "mlp", "qkv", "attention", "norms", "residuals", "loss", "prefix")


def llama() -> Any:
    return peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(target_modules="all-linear"))


def test_names_of_parts() -> None:
    model = llama()
    expected = f"without: expected some of {', '.join(PARTS)}, got 'flash', 'mlps'"
    with pytest.raises(ValueError, match=expected):
        pk.patch(model, without=("mlp", "mlps", "flash"))
    with pytest.raises(TypeError, match="without: expected names of parts, got a bool"):
        pk.patch(model, without=True)  # type: ignore[arg-type]
    assert not any(fused.record_of(module) for module in model.modules())


@pytest.mark.parametrize("part", PARTS)
def test_one_part(part: str) -> None:
    """Alone it changes rounding only, and everything is restored."""
    model = llama()
    ids = torch.arange(24).view(2, 12)
    want = model(input_ids=ids, labels=ids)
    logits, loss = want.logits.detach().clone(), want.loss.detach()
    with pk.patched(model, without=[one for one in PARTS if one != part]) as report:
        got = model(input_ids=ids, labels=ids)
        torch.testing.assert_close(got.loss, loss)
        torch.testing.assert_close(got.logits.detach(), logits)
        assert part == "prefix" or any(entry.fused for entry in report.entries)
        assert not any(entry.fallbacks for entry in report.entries), report
    assert torch.equal(model(input_ids=ids, labels=ids).logits, logits)


def test_explain_keeps_the_parts_and_says_what_is_not_patched() -> None:
    model = models.tiny_llama()
    assert pk.explain(model).splitlines()[-1] == "the model is not patched: pk.patch(model) does it"
    assert "loss without logits, LlamaForCausalLM: logits are computed" in pk.explain(model)
    report = pk.patch(model, without="norms")
    assert str(report) == pk.explain(model) and "norm" not in str(report)
    pk.patch(model, without="norms")
    assert "norm" not in pk.explain(model)


def test_attention_chosen_after_the_patch() -> None:
    model = llama()
    model.base_model.model.set_attn_implementation("eager")
    report = pk.patch(model)
    assert "in part, 2 layers: its attention function is 'eager'" in str(report)
    model.base_model.model.set_attn_implementation("sdpa")
    assert "in part" not in str(report)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_model_is_said_to_run_its_own_code(how: str) -> None:
    model = models.tiny_llama()
    pk.patch(model)
    told = "in what torch.compile compiled, the model's own code runs for: "
    assert told not in pk.explain(model)
    if how == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    assert f"{told}decoder layer, attention, norm, loss without logits" in pk.explain(model)


def test_calls_of_sdpa_are_counted() -> None:
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).train()
    report = pk.patch(model)
    ids = torch.arange(12).view(2, 6)
    gaps = torch.tensor([True, False, True, False, True, True]).expand(2, 1, 6, 6)
    model(input_ids=ids, attention_mask=gaps)
    told = "1 call of 1 layer: attention by sdpa, a mask that is not one or two spans of keys a row"
    assert told in str(report)
    model(input_ids=ids)
    model.generate(
        ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    assert report.blocks[0].fallbacks.total() == 1


def test_replaced_sdpa_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside torch's context_parallel that of torch.nn.functional attends across processes."""
    functional, calls = torch.nn.functional, []
    torchs = functional.scaled_dot_product_attention
    replaced = lambda *args, **kwargs: calls.append(0) or torchs(*args, **kwargs)  # noqa: E731
    model = llama()
    report = pk.patch(model)
    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", replaced)
        model(input_ids=torch.arange(24).view(2, 12))
    assert len(calls) == 2
    expected = "2 calls of 2 layers: attention by sdpa, torch's function is replaced, as by context_parallel"
    assert expected in str(report)
    model(input_ids=torch.arange(24).view(2, 12))
    assert len(calls) == 2


def test_advice_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_mallopt", lambda: object())
    model = llama()
    report = pk.patch(model)
    advice = "for training on a CPU: call pk.keep_freed_memory() once at start to reuse memory"
    assert str(report).splitlines()[-1] == advice
    model.requires_grad_(False)
    assert advice not in str(report)
    model.requires_grad_(True)
    monkeypatch.setattr(host_memory, "_kept", True)
    assert advice not in str(report)
