"""`pk.patch(model)`: norms, rotary embeddings, and queries, keys and values from one op."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from flow_blocks import between, family, one_step, patched
from flow_checks import assert_fused, assert_near, assert_same_numbers, block_fallbacks, language_loss, step
from flow_models import adapted, ids, in_fp64, llama
from installed import before
from peft_models import add_adapter
from rounding import BF16_STEP, ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch.block import attention as fused_attention
from peft_kernels.patch.fused import Fallback
from peft_kernels.patch.rules import verdict

FAMILIES = {
    "Llama": 5, "Mistral": 5, "Qwen2": 5, "Qwen3": 9, "Granite": 5, "Gemma": 5, "Gemma2": 9, "Gemma3": 13,
    "SmolLM3": 5,
}  # fmt: skip
"""Families, and their number of norms."""


@pytest.fixture(autouse=True)
def _clear_verdicts() -> Iterator[None]:
    yield
    verdict._verdicts.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients(name: str, dtype: torch.dtype, op_counts: Counter[str]) -> None:
    stock = adapted(family(name).to(dtype))
    model, report = patched(stock)
    assert [entry.reason for entry in between(report, "attention")] == [""] * 2
    assert [entry.fused for entry in between(report, "norm")].count(True) == FAMILIES[name], report
    op_counts.clear()
    assert_same_numbers(
        lambda i: tuple(  # type: ignore[arg-type,return-value]
            step(m, lambda m: language_loss(m, ids(i))) for m in (model, stock, in_fp64(stock))
        ),
        1e-3 if dtype == torch.float32 else 0.3,
    )
    rotated = 1 if name == "SmolLM3" else 2  # one of its layers has no rotary embedding
    forwards, rest = divmod(op_counts["rotary"], rotated)
    assert forwards and not rest and (forwards == 1 or dtype != torch.float32)
    assert op_counts["multi_lora_linear"] == 2 * forwards
    assert op_counts["rms_norm"] + op_counts["add_rms_norm"] == forwards * FAMILIES[name]
    assert_fused(model, report)


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Olmo2"])
def test_norms_round_like_stock(name: str, op_counts: Counter[str]) -> None:
    """Bits differ in a few of a thousand elements, where sums round differently."""
    norm = family(name).bfloat16().model.norm
    norm.weight.data += 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(2))
    x = testing.tensor(128, 64, dtype=torch.bfloat16, scale=3.0)
    want = norm(x)
    pk.patch(norm)
    assert (norm(x) != want).double().mean() < 0.01 and op_counts["rms_norm"] == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_called_as_before(name: str) -> None:
    """Every attention function of the configuration gets the same arguments."""
    seen: list[Any] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(module).__name__, [t.shape for t in (q, k, v)], args, kwargs))
        return q.transpose(1, 2), "weights"

    transformers.AttentionInterface.register("recorder", attend)
    stock = family(name, attention_dropout=0.2, **({"sliding_window": 3} if name == "Mistral" else {}))
    stock.set_attn_implementation("recorder")
    model, _ = patched(stock.train())
    for mode in (True, False):
        for one in (stock, model):
            one.train(mode)(input_ids=ids(), marked=7)
        layers = len(seen) // 2
        assert layers == 2 and repr(seen[layers:]) == repr(seen[:layers])
        assert seen[0][3]["marked"] == 7 and (seen[0][3]["dropout"] == 0.2) is mode
        assert ("sliding_window" in seen[0][3]) is (name not in ("Llama", "Granite", "Gemma"))
        assert ("softcap" in seen[0][3]) is (name == "Gemma2")
        seen.clear()


@pytest.mark.parametrize("base", ["nf4", "bnb"])
def test_under_autocast(base: str, op_counts: Counter[str]) -> None:
    """As in tutorials: norms in fp32, packed weights, adapters in fp32."""
    stock = adapted(llama(base))
    model, report = patched(stock)
    other = copy.deepcopy(stock)
    pk.patch(other)
    truth = in_fp64(stock)

    def under_autocast(model: Any, i: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not truth):
            return step(model, lambda m: language_loss(m, ids(i)))

    parts = model, other, truth
    assert_same_numbers(lambda i: tuple(under_autocast(m, i) for m in parts), 3 * BF16_STEP)  # type: ignore[arg-type,return-value]
    assert op_counts["multi_lora_linear"] and op_counts["rms_norm"]
    assert_fused(model, report, blocks=2)


def test_without_adapters_bits_equal_stock() -> None:
    """Modules are called, and rotary embeddings give stock's bits."""
    stock = llama("dense", torch.bfloat16)
    model, report = patched(stock, without=("attention", "norms", "residuals", "loss"))
    got, want = one_step(model), one_step(stock)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert len(between(report, "attention")) == 2 and not block_fallbacks(report)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("adapters", ["one", "two", "by row"])
def test_a_trace_of_torchscript(adapters: str) -> None:
    """TorchScript cannot record lists of layers or adapters, so these use the original forwards."""
    stock = adapted(llama("dense")).requires_grad_(False).eval()
    add_adapter(stock, "other", r=2, target_modules=["q_proj", "down_proj"])
    names = {"adapter_names": ["default", "other", "__base__", "other"]} if adapters == "by row" else {}
    if adapters == "two":
        stock.base_model.set_adapter(["default", "other"])
    stock.requires_grad_(False)
    model, report = patched(stock)
    model(input_ids=ids())  # must not use a cached call
    traced = torch.jit.trace(
        lambda tokens: model(input_ids=tokens, use_cache=False, **names).logits, (ids(),), check_trace=False
    )
    want = stock(input_ids=ids(2), **names).logits
    assert testing.relative_error(traced(ids(2)), want) < ONE_MODEL
    assert not block_fallbacks(report)


def test_generate_gives_the_same_tokens() -> None:
    stock = adapted(llama("nf4")).eval()
    model, report = patched(stock)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, :4] = 0
    for cache in ("dynamic", "static"):
        given: dict[str, Any] = {"input_ids": ids(), "attention_mask": mask, "max_new_tokens": 5}
        given |= {"do_sample": False, "cache_implementation": cache, "disable_compile": True}
        assert torch.equal(model.generate(**given), stock.generate(**given))
    assert not block_fallbacks(report)


def test_cache_under_autocast_equals_stock_s() -> None:
    stock = adapted(llama("bnb")).eval()
    model, _ = patched(stock)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m(input_ids=ids(), use_cache=True).past_key_values for m in (model, stock))
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.keys.dtype == other.keys.dtype and mine.values.dtype == other.values.dtype


def test_changed_adapters_take_effect(op_counts: Counter[str]) -> None:
    """Disabled, merged, with dropout; variants of LoRA and hooks use the original forward."""
    stock = adapted(llama("dense"), lora_dropout=0.3).eval()
    model, report = patched(stock)
    want = {"y": stock(input_ids=ids()).logits}
    assert_near({"y": model(input_ids=ids()).logits}, want)
    assert op_counts.pop("multi_lora_linear") == 2
    with model.disable_adapter(), stock.disable_adapter():
        assert_near({"y": model(input_ids=ids()).logits}, {"y": stock(input_ids=ids()).logits})
    model.merge_adapter()
    assert_near({"y": model(input_ids=ids()).logits}, want)
    assert not op_counts["multi_lora_linear"] and not block_fallbacks(report)
    model.unmerge_adapter()
    model.train()
    assert not torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model.eval()
    attention = model.base_model.model.model.layers[0].self_attn
    seen: list[int] = []
    hook = attention.k_proj.register_forward_hook(lambda *_: seen.append(1))
    assert_near({"y": model(input_ids=ids()).logits}, want)
    hook.remove()
    assert seen == [1] and block_fallbacks(report).total() == 1
    assert "k_proj: hooks" in str(report)


def test_dora_uses_the_original_forward() -> None:
    stock = adapted(llama("dense"), use_dora=True)
    model, report = patched(stock)
    assert_near(one_step(model), one_step(stock))
    assert "q_proj: DoRA or another variant" in str(report)
    assert all(entry.fused for entry in between(report, "norm"))


def test_unpatch_and_copies() -> None:
    stock = adapted(llama("nf4"))
    model, _ = patched(stock)
    twin = copy.deepcopy(model)
    assert_near(one_step(twin), one_step(stock))
    assert len(pk.patch(twin).blocks) == 11 and pk.unpatch(twin) and pk.unpatch(model)
    for one in (model, twin):
        assert [type(m) for m in one.modules()] == [type(m) for m in stock.modules()]
        got, want = one_step(one), one_step(stock)
        assert all(torch.equal(got[name], want[name]) for name in want)
    with pk.patched(model) as report:
        assert len(report.blocks) == 11
    assert not pk.unpatch(model)


def test_parts_that_are_left_out() -> None:
    blocks = {"mlp": 2, "qkv": 0, "attention": 0, "qkv attention": 2, "norms": 5, "residuals": 2}
    for parts, count in blocks.items():
        model = adapted(llama("dense"))
        report = pk.patch(model, without=parts.split())
        assert len(report.blocks) == 11 - count and pk.patch(model, dry_run=True, without=parts.split()) != 0
        assert not any(entry.planned for entry in pk.patch(model, parts.split(), dry_run=True).blocks)
        assert str(report) == pk.explain(model)


def test_foreign_functions_are_not_fused(monkeypatch: pytest.MonkeyPatch, op_counts: Counter[str]) -> None:
    """Liger replaces transformers' functions, before or after the patch."""
    from transformers.models.llama import modeling_llama

    stock = adapted(llama("dense"))
    model, report = patched(stock)
    theirs = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: theirs(q, k, *rest))
    op_counts.clear()
    assert_near(one_step(model), one_step(stock))
    assert op_counts["rotary"] == 2, "it computes the same"
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: theirs(q, k, cos, -sin)
    )
    op_counts.clear()
    assert_near(one_step(model), one_step(stock))
    assert not op_counts["rotary"] and block_fallbacks(report).total() == 2
    assert "its forward is none of those known here" in str(report)

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", Other.forward)
    op_counts.clear()
    one_step(model)
    assert not op_counts["rms_norm"]
    assert "its forward is none of the norms known here" in str(report)


class HalvedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.weight * nn.functional.rms_norm(x, (64,), eps=self.eps)


def test_unknown_norms_and_layers_are_reported() -> None:
    model = family("Llama")
    model.model.layers[0].input_layernorm = HalvedRMSNorm()
    report = pk.patch(model)
    reason = "its forward is none of the norms known here; nothing to do"
    assert f"{reason}: model.layers.0.input_layernorm" in str(report)
    model = family("Cohere")
    report = pk.patch(model)
    assert "in part, 2 layers: projections by its own forward, its forward is none of those k" in str(report)


def test_other_calls_use_the_original_forward() -> None:
    """Without position embeddings, or with another name of the cache; errors are stock's."""
    model, report = patched(family("Llama"))
    attention, x = model.model.layers[0].self_attn, torch.ones(1, 3, 64)
    assert fused_attention._run(attention, x) == Fallback()
    with pytest.raises(TypeError):
        attention(x)
    with pytest.raises(TypeError, match="hidden_states"):
        attention()
    cos = torch.ones(1, 3, 16)
    if not before("transformers", "5.24"):  # which has the cache by this name
        assert fused_attention._run(attention, x, (cos, cos), past_key_values=None) == Fallback()
    assert isinstance(attention(x, (cos, cos), None)[0], Tensor)
    assert not block_fallbacks(report)


def test_compiled_models_use_the_original_forward(op_counts: Counter[str]) -> None:
    """A compiler fuses these ops itself."""
    model, _ = patched(family("Llama", num_hidden_layers=1))
    layer, x, cos = model.model.layers[0], torch.ones(1, 3, 64), torch.ones(1, 3, 16)
    want = layer(x, position_embeddings=(cos, cos))
    assert op_counts["rms_norm"] == op_counts["add_rms_norm"] == op_counts["rotary"] == 1
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_near({"y": compiled(x, position_embeddings=(cos, cos))}, {"y": want})
    assert op_counts["rms_norm"] == op_counts["add_rms_norm"] == op_counts["rotary"] == 1
