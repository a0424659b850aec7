"""Decoder layers of a patched model: one op for the residual sum and the norm, and norms in
the dtype to which autocast would round them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from flow_blocks import between, family, one_step, patched
from flow_checks import assert_near, block_fallbacks
from flow_models import adapted, llama
from rounding import BF16, BF16_STEP
from torch import Tensor, nn

from peft_kernels.patch.block import decoder_layer

FAMILIES = {"Llama": 2, "Mistral": 2, "Qwen3": 2, "Gemma": 2, "Mixtral": 2, "Granite": 0, "Gemma2": 0}
"""Families, and how many of their layers have Llama's forward."""


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_recognised_by_source(name: str, op_counts: Counter[str]) -> None:
    stock = family(name)
    model, report = patched(stock)
    assert [entry.reason for entry in between(report, "decoder layer")] == [""] * FAMILIES[name]
    assert_near(one_step(model), one_step(stock))
    assert op_counts["add_rms_norm"] == FAMILIES[name] and not block_fallbacks(report)


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The dtypes with which the norms of decoder layers were called."""
    seen: list[Any] = []

    def normed(operands: Any, dtype: Any, *args: Tensor, _normed: Any = decoder_layer._normed) -> Any:
        seen.append(dtype)
        return _normed(operands, dtype, *args)

    monkeypatch.setattr(decoder_layer, "_normed", normed)
    return seen


def under_autocast(model: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype):
        return one_step(model)


def test_dtypes_of_norms_under_autocast(dtypes: list[Any]) -> None:
    """16-bit only in training, because a cache may keep the values in evaluation, and only if no hook sees
    the input. Results have the bits of an fp32 norm that each reader rounds."""
    model, report = patched(adapted(llama("nf4")).train())
    got = under_autocast(model)
    assert dtypes == [torch.bfloat16] * 4
    dtypes.clear()
    seen: list[torch.dtype] = []
    layer = model.base_model.model.model.layers[0]
    hooks = [
        half.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].dtype), with_kwargs=True
        )
        for half in (layer.self_attn, layer.mlp)
    ]
    other = under_autocast(model)
    assert dtypes == [None, None, torch.bfloat16, torch.bfloat16] and seen == [torch.float32] * 2
    assert_near(other, got, BF16)
    assert torch.equal(other["loss"], got["loss"])
    for hook in hooks:
        hook.remove()
    dtypes.clear()
    model.eval()
    under_autocast(model)
    assert dtypes == [None] * 4 and not block_fallbacks(report)


def test_autocast_to_another_16_bit_dtype(dtypes: list[Any]) -> None:
    """A bf16 residual stream with autocast to fp16: the norms stay bf16."""
    stock = adapted(family("Llama")).bfloat16().train()
    model, report = patched(stock)
    assert_near(under_autocast(model, torch.float16), under_autocast(stock, torch.float16), BF16_STEP)
    assert dtypes == [torch.float16] * 4 and not block_fallbacks(report)


def test_experts_keep_their_fp32_input(dtypes: list[Any]) -> None:
    """A router computes in fp32; only a fused gated MLP is known to round its input."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model, report = patched(
        adapted(family("Qwen3Moe", **options), target_modules=["q_proj", "o_proj"]).train()
    )
    assert [entry.reason for entry in between(report, "decoder layer")] == ["", ""]
    under_autocast(model)
    assert dtypes == [torch.bfloat16, None] * 2 and not block_fallbacks(report)


def test_hooks_on_norms_run(op_counts: Counter[str]) -> None:
    stock = adapted(llama("dense"))
    model, report = patched(stock)
    seen: list[int] = []
    norm = model.base_model.model.model.layers[1].post_attention_layernorm
    hook = norm.register_forward_hook(lambda *_: seen.append(1))
    assert_near(one_step(model), one_step(stock))
    assert seen == [1] and op_counts["add_rms_norm"] == 1
    assert "post_attention_layernorm: hooks" in str(report)
    hook.remove()
    assert_near(one_step(model), one_step(stock))
    assert seen == [1] and block_fallbacks(report).total() == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool, op_counts: Counter[str]) -> None:
    """The layer is recomputed in backward with the same bits."""
    model, report = patched(adapted(llama("nf4")).train())
    model.enable_input_require_grads()
    want = one_step(model)
    assert op_counts["add_rms_norm"] == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = one_step(model)
    counted = 4 if reentrant else 6  # its first forward has no gradient: the layers run prepared
    assert op_counts["add_rms_norm"] == counted and not block_fallbacks(report)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_arguments_reach_attention() -> None:
    """By position and by name, with the defaults of the layer."""
    calls: list[Any] = []

    class Attention(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            x = kwargs.pop("hidden_states")
            calls.append((args, kwargs))
            return x, None

    stock = family("Llama", num_hidden_layers=1)
    stock.model.layers[0].self_attn = Attention()
    model, report = patched(stock)
    x = torch.linspace(-1, 1, 64).expand(1, 3, 64)
    for args, kwargs in (
        ((), {}),
        (("mask", "positions"), {"use_cache": True, "marked": 7}),
        ((), {"past_key_values": "old name"}),
    ):
        got, want = (m.model.layers[0](x, *args, **kwargs) for m in (model, stock))
        assert_near({"y": got}, {"y": want})
        assert calls[0] == calls[1]
        calls.clear()
    with pytest.raises(TypeError, match="hidden_states"):
        model.model.layers[0]()
    assert not block_fallbacks(report)


def test_unsupported_branch_is_added_by_torch() -> None:

    class Attention(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Any:
            return hidden_states[:, :1], None

    stock = family("Llama", num_hidden_layers=1)
    stock.model.layers[0].self_attn = Attention()
    model, report = patched(stock)
    x = torch.linspace(-1, 1, 64).expand(1, 3, 64)
    assert_near({"y": model.model.layers[0](x)}, {"y": stock.model.layers[0](x)})
    assert not block_fallbacks(report)


@pytest.mark.parametrize("later", [False, True])
def test_unknown_norms_are_reported(later: bool) -> None:
    stock = family("Llama")
    model, report = patched(stock)
    for one in (stock, model):
        one.model.layers[0].input_layernorm = nn.LayerNorm(64)
    if not later:
        model, report = patched(stock)
        first, second = between(report, "decoder layer")
        assert "a LayerNorm, which is none of the norms known here" in str(first) and second.fused
    assert_near(one_step(model), one_step(stock))
    assert block_fallbacks(report).total() == later and "input_layernorm: a LayerNorm" in str(report)
