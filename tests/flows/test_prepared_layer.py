"""Decoder layers without a gradient: operands collected once give the bits of calling module by module, and
every change of the model is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flow_blocks import family
from flow_models import adapted, ids, llama
from peft_models import add_adapter
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import fused
from peft_kernels.patch.block import prepared_layer

Run = Callable[..., Tensor | None]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of a decoder layer ran prepared."""
    calls: list[bool] = []
    run = prepared_layer.run

    def counting(*args: Any) -> Tensor | None:
        out = run(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(prepared_layer, "run", counting)
    yield calls


def by_modules(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """The result of a call without prepared layers."""
    run: Run = prepared_layer.run
    prepared_layer.run = lambda *args: None
    try:
        return call()
    finally:
        prepared_layer.run = run


def generated(model: Any, **options: Any) -> Tensor:
    tokens = model.generate(
        ids(1, rows=2, length=7), max_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, **options,
    )  # fmt: skip
    return torch.stack(tokens.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_bits_are_those_of_the_modules(
    name: str, base: str, dtype: torch.dtype, prepared: list[bool]
) -> None:
    model = family(name).to(dtype)
    model = adapted(pk.quantize_model(model) if base == "nf4" else model).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    pk.patch(model)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
        prepared.clear()
        got = generated(model, **options)
        assert prepared and all(prepared)
        want = by_modules(model, lambda: generated(model, **options))  # noqa: B023
        assert torch.equal(got, want)
    layers = [m for m in model.modules() if fused.record_of(m) is not None and hasattr(m, "self_attn")]
    assert [fused.record_of(layer).attempts for layer in layers] == [1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("state", ["plain", "merged", "disabled", "some"])
def test_layers_without_active_adapters(
    state: str, base: str, dtype: torch.dtype, prepared: list[bool]
) -> None:
    """The MLP runs in our ops, and dense layers in our kernel, which round elsewhere than torch's."""
    model = family("Llama").to(dtype)
    model = pk.quantize_model(model) if base == "nf4" else model
    if state != "plain":
        targets = ["q_proj", "up_proj"] if state == "some" else "all-linear"
        model = adapted(model, target_modules=targets).to(dtype)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model.eval()
    pk.patch(model)
    if state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    with torch.no_grad():
        got = model(ids(1)).logits
        assert prepared and all(prepared)
        again = model(ids(1)).logits
        want = by_modules(model, lambda: model(ids(1)).logits)
        assert torch.equal(again, got)
        assert testing.relative_error(got, want) < (1e-5 if dtype == torch.float32 else 0.03)
        if state in ("merged", "disabled"):
            model.unmerge_adapter() if state == "merged" else model.base_model.enable_adapter_layers()
            active = model(ids(1)).logits
            assert testing.relative_error(active, by_modules(model, lambda: model(ids(1)).logits)) < ONE_MODEL
            assert state == "merged" or testing.relative_error(active, got) > 1e-4


@pytest.mark.parametrize("part", ["layers", "mlp", "qkv", "norms", "residuals"])
def test_parts_left_out_are_not_prepared(part: str, prepared: list[bool]) -> None:
    model = adapted(llama("nf4")).eval()
    pk.patch(model, without=part)
    with torch.no_grad():
        model(ids(2))
    assert not any(prepared)


def of_layer(*path: str) -> Callable[[Any], Any]:
    def find(model: Any) -> Any:
        return model.base_model.model.model.layers[0].get_submodule(".".join(path))

    return find


def hook(name: str) -> Callable[[Any], None]:
    return lambda model: of_layer(name)(model).register_forward_hook(lambda m, args, out: _doubled(out))


def _doubled(out: Any) -> Any:
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


def change_eps(model: Any) -> None:
    of_layer("input_layernorm")(model).variance_epsilon = 3.0


def replace_weight(model: Any) -> None:
    norm = of_layer("post_attention_layernorm")(model)
    norm.weight = nn.Parameter(norm.weight * 3)


def other_adapter(model: Any) -> None:
    add_adapter(model, "other", r=2, target_modules=["q_proj"])
    model.set_adapter("other")


def forward_of_a_norm(model: Any) -> None:
    norm = of_layer("input_layernorm")(model)
    norm.forward = lambda x: 3 * x


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on a norm": hook("input_layernorm"),
    "hook on attention": hook("self_attn"),
    "hook on the MLP": hook("mlp"),
    "hook on a projection": hook("self_attn.o_proj"),
    "hook inside": hook("mlp.down_proj.lora_A.default"),
    "eps": change_eps,
    "weight of a norm": replace_weight,
    "values of a weight": lambda model: of_layer("input_layernorm")(model).weight.data.mul_(3),
    "forward of a norm": forward_of_a_norm,
    "scaling": lambda model: of_layer("mlp.up_proj")(model).scale_layer(3.0),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: (of_layer("self_attn.v_proj")(model).scale_layer(3.0), model.merge_adapter()),
    "other adapter": other_adapter,
    "activation": lambda model: setattr(of_layer("mlp")(model), "act_fn", nn.ReLU()),
    "training with dropout": lambda model: setattr(
        of_layer("self_attn.q_proj")(model).lora_dropout, "default", nn.Dropout(1.0).train()
    ),
    "attention function": lambda model: model.base_model.model.set_attn_implementation("eager"),
    "window": lambda model: setattr(of_layer("self_attn")(model), "scaling", 3.0),
}
SAME_NUMBERS = ("attention function",)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, prepared: list[bool]) -> None:
    model = adapted(llama("nf4")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    pk.patch(model)
    batch = ids(2)
    with torch.no_grad():
        before = model(batch).logits
        assert all(prepared)
        CHANGES[change](model)
        got = model(batch).logits
        pk.unpatch(model)
        want = model(batch).logits
    assert testing.relative_error(before, want) > 1e-4 or change in SAME_NUMBERS
    assert testing.relative_error(got, want) < ONE_MODEL


def test_liger_replaces_the_rotary_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model = adapted(llama("nf4")).eval()
    pk.patch(model)
    with torch.no_grad():
        before = model(ids(2)).logits
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: (q, k))
        got = model(ids(2)).logits
        pk.unpatch(model)
        want = model(ids(2)).logits
    assert testing.relative_error(before, want) > 1e-4 and testing.relative_error(got, want) < ONE_MODEL


def test_a_rotary_function_that_is_a_module(prepared: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.25 makes it one where `kernels` is installed, and `kernelize` replaces its forward."""
    from transformers.models.llama import modeling_llama

    theirs = modeling_llama.apply_rotary_pos_emb

    class Func(nn.Module):
        def forward(self, *args: Any) -> Any:
            return theirs(*args)

    rotary: Any = Func()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    model = adapted(llama("nf4")).eval()
    pk.patch(model)
    with torch.no_grad():
        before = [model(ids(2)).logits for _ in range(2)]
        assert prepared and all(prepared) and torch.equal(*before)
        rotary.forward = lambda q, k, *rest: (q, k)
        got = model(ids(2)).logits
        pk.unpatch(model)
        want = model(ids(2)).logits
    assert testing.relative_error(before[0], want) > 1e-4 and testing.relative_error(got, want) < ONE_MODEL


def test_a_replaced_norm_of_heads_is_seen() -> None:
    model = adapted(family("Qwen3")).eval()
    pk.patch(model)
    attention = of_layer("self_attn")(model)
    with torch.no_grad():
        before = model(ids(2)).logits
        attention.q_norm = copy.deepcopy(attention.q_norm)
        attention.q_norm.weight.mul_(3)
        got = model(ids(2)).logits
        pk.unpatch(model)
        want = model(ids(2)).logits
    assert testing.relative_error(before, want) > 1e-4 and testing.relative_error(got, want) < ONE_MODEL


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "LlamaAttention", "LlamaMLP", "LlamaDecoderLayer"])
def test_a_forward_replaced_for_the_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger does, after the patch."""
    from transformers.models.llama import modeling_llama

    model = adapted(llama("nf4")).eval()
    pk.patch(model)
    cls = getattr(modeling_llama, name)
    forward = cls.forward
    replaced: Any = lambda self, *args, **kwargs: _doubled(forward(self, *args, **kwargs))  # noqa: E731
    with torch.no_grad():
        before = model(ids(2)).logits
        monkeypatch.setattr(cls, "forward", replaced)
        got = model(ids(2)).logits
        pk.unpatch(model)
        want = model(ids(2)).logits
    assert testing.relative_error(before, want) > 1e-4 and testing.relative_error(got, want) < ONE_MODEL


def test_fp64_runs_module_by_module(prepared: list[bool]) -> None:
    model = adapted(llama("dense")).eval()
    pk.patch(model)
    model.double()
    with torch.no_grad():
        got = model(ids(2)).logits
        pk.unpatch(model)
        want = model(ids(2)).logits
    assert prepared and not any(prepared) and testing.relative_error(got, want) < 1e-12


def test_gradients_autocast_modes_and_copies(prepared: list[bool]) -> None:
    model = adapted(llama("nf4")).eval()
    pk.patch(model)
    with torch.no_grad():
        want = model(ids(2)).logits
        twin = copy.deepcopy(model)
        of_layer("mlp.up_proj")(twin).scale_layer(5.0)
        assert torch.equal(model(ids(2)).logits, want)
    prepared.clear()
    model(ids(2)).logits.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids(2))
    with torch.no_grad(), pk.use_backend("reference"):
        model(ids(2))
    assert not any(prepared)
    with torch.inference_mode():
        assert torch.equal(model(ids(2)).logits, want) and prepared[-1]


def test_a_layer_that_cannot_be_prepared_is_not_tried_for_ever() -> None:
    model = adapted(llama("nf4"), use_dora=True).eval()
    pk.patch(model)
    with torch.no_grad():
        for _ in range(prepared_layer._MAX_ATTEMPTS + 3):
            model(ids(2))
    record = fused.record_of(model.base_model.model.model.layers[0])
    assert record is not None and record.attempts <= prepared_layer._MAX_ATTEMPTS and record.cached is None
