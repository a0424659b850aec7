"""pk's attention function in transformers' models, against "sdpa": masks, outputs, gradients, generate."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import bottleneck_models as bm
import models
import pytest
import torch
import transformers
from installed import before
from peft_models import gradients
from rounding import ONE_MODEL, ONE_STEP, assert_close_together
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
import testing
from peft_kernels.integrations.attention import use
from peft_kernels.patch.block import attend as ours

ours.register()
LENGTH = 21


def padded(side: str) -> Tensor:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, count in enumerate((0, 4, 11)):
        mask[row, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = 0
    return mask


def inputs(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (3, LENGTH), generator=torch.Generator().manual_seed(1 + testing.SEED))
    if kind == "packed":
        return {"input_ids": ids[:1], "position_ids": torch.cat([torch.arange(n) for n in (8, 1, 12)])[None]}
    if kind == "hole":  # two spans of keys, as for completions that share a prompt
        mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
        mask[1:, :, 9:, 4:9] = False
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids} | ({} if kind == "whole" else {"attention_mask": padded(kind)})


def llama(**options: Any) -> Any:
    return models.tiny_llama(**options)


def sliding(**options: Any) -> Any:
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config)


class Calls:
    """`theirs`: calls of ours that fell back to sdpa."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = self.theirs = 0
        op, sdpa = ours.attention, ours.sdpa_attention_forward

        def call_op(*args: Any) -> Tensor:
            self.ours += 1
            return op(*args)

        def call_sdpa(*args: Any, **kwargs: Any) -> Any:
            self.theirs += 1
            return sdpa(*args, **kwargs)

        monkeypatch.setattr(ours, "attention", call_op)
        monkeypatch.setattr(ours, "sdpa_attention_forward", call_sdpa)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def results(model: Any, given: dict[str, Tensor], seen: Tensor | None = None) -> dict[str, Tensor]:
    """Logits outside the padding, and all gradients."""
    model.zero_grad()
    logits = model(**given, use_cache=False).logits
    logits = logits if seen is None else logits[seen.bool()]
    (logits.float() * testing.tensor(*logits.shape, seed=3)).sum().backward()
    return {"logits": logits.detach(), **gradients(model)}


def assert_same_numbers(calls: Calls, model: Any, given: dict[str, Tensor], autocast: bool = False) -> None:
    """Dtypes are sdpa's, and errors as large by the numbers policy."""
    seen = given.get("attention_mask")
    seen = seen if seen is not None and seen.dim() == 2 else None
    truth = results(copy.deepcopy(model).double(), given, seen)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = results(model, given, seen)
        model.set_attn_implementation(ours.NAME)
        calls.ours = 0
        got = results(model, given, seen)
    assert calls.ours == 2 and not calls.theirs
    assert_close_together(got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "left", "right", "packed", "hole"])
@pytest.mark.parametrize("make", [llama, sliding])
def test_values(calls: Calls, make: Any, kind: str, dtype: torch.dtype) -> None:
    model, given = make().to(dtype), inputs(kind)
    assert_same_numbers(calls, model, given)


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2", "vit", "t5"])
def test_other_families(calls: Calls, family: str) -> None:
    """Encoders, cross-attention and images; T5's position biases use sdpa."""
    if family == "t5" and before("transformers", "5.23"):
        pytest.skip("T5 has its own attention in this transformers")
    about = bm.FAMILIES[family]
    model, given = about.make(), about.inputs()
    want = bm.output(model, given)
    model.set_attn_implementation(ours.NAME)
    got = bm.output(model, given)
    assert testing.relative_error(got, want) < ONE_MODEL
    assert calls.theirs > 0 if family == "t5" else calls.ours > 0 and not calls.theirs


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(calls: Calls, cache: str) -> None:
    """The prompt uses the op, single tokens use sdpa."""
    model = llama(initializer_range=0.3).eval()
    given = inputs("left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True, "pad_token_id": 0}
    want = model.generate(**given, **options)
    model.set_attn_implementation(ours.NAME)
    assert torch.equal(model.generate(**given, **options), want)
    assert calls.ours == 2 and calls.theirs == 10


def test_autocast(calls: Calls) -> None:
    """The dtype is sdpa's, even where fp32 norms make rotary embeddings and queries fp32."""
    assert_same_numbers(calls, llama(), inputs("left"), autocast=True)


def test_other_masks_use_sdpa(calls: Calls) -> None:
    """A mask with three spans of keys, and an additive mask with other values."""
    model, given = llama().eval(), inputs("whole")
    holes = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    holes[:, :, 9:, [4, 6]] = False
    added = torch.where(holes, 0.0, torch.finfo(torch.float32).min)
    for mask in (holes, added):
        want = model(**given, attention_mask=mask).logits
        model.set_attn_implementation(ours.NAME)
        assert torch.equal(model(**given, attention_mask=mask).logits, want)
        model.set_attn_implementation("sdpa")
    assert calls.theirs == 4 and not calls.ours


@pytest.mark.parametrize("write", ["in place", "data", "numpy", "inference"])
def test_changed_mask_is_read_again(calls: Calls, write: str) -> None:
    """Also after writes that keep its version counter: `.data`, numpy and inference tensors."""
    model, given = llama().eval(), inputs("whole")
    with torch.inference_mode(write == "inference"):
        masks = [torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril() for _ in range(2)]
        for attention, mask in zip(("sdpa", ours.NAME), masks, strict=True):
            model.set_attn_implementation(attention)
            before = model(**given, attention_mask=mask).logits
            written: Any = {"data": mask.data, "numpy": mask.numpy()}.get(write, mask)
            written[:, 0, 4:, :4] = False
            after = model(**given, attention_mask=mask).logits
            if attention == "sdpa":
                want = after
                assert testing.relative_error(before, want) > 0.1
        assert testing.relative_error(after, want) < ONE_MODEL
    assert calls.ours == 2 * 2 and not calls.theirs


def test_spans() -> None:
    """Every mask of a row of eleven keys is reproduced by spans, or has too many."""
    attends = (torch.arange(2**11)[:, None] >> torch.arange(11) & 1).bool()
    key, q, k = torch.arange(11), testing.tensor(1, 1, 1, 8), testing.tensor(1, 1, 11, 8)
    for row in attends:
        spans = ours.spans_of(row.view(1, 1, 1, 11), q, k)
        count = int((row[1:] & ~row[:-1]).sum() + row[0])
        assert (spans is None) == (count > 2)
        if spans is not None:
            first, end = spans[0, 0, :, :, None].unbind(1)
            assert torch.equal(((key >= first) & (key < end)).any(0), row)
    many = attends.repeat(2, 1, 1)  # rows of one mask; a single row with too many spans decides
    q = testing.tensor(2, 1, 2**11, 8)
    k = testing.tensor(2, 1, 11, 8)
    assert ours.spans_of(many[:, None], q, k) is None
    few = many.clone()
    few[(few[..., 1:] & ~few[..., :-1]).sum(-1) + few[..., 0] > 2] = False
    spans = ours.spans_of(few[:1, None], q, k)  # one mask for all samples
    assert spans is not None and spans.shape == (2, 2**11, 2, 2)
    assert torch.equal(spans.diff(dim=-1).sum((-1, -2)), few.sum(-1))


def test_masks_in_inference_mode(calls: Calls) -> None:
    model, given = llama().eval(), inputs("left")
    seen = given["attention_mask"].bool()
    with torch.inference_mode():
        want = model(**given).logits[seen]
        use(model)
        assert testing.relative_error(model(**given).logits[seen], want) < ONE_MODEL
        assert calls.ours == 2 and not calls.theirs


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::torch.jit.TracerWarning")
def test_masks_without_readable_values() -> None:
    """With fake tensors, under vmap, and in a trace, which must also work for other masks."""
    model, given = llama().eval().requires_grad_(False), inputs("left")
    want = model(**given, use_cache=False).logits
    use(model)

    def logits(ids: Tensor, mask: Tensor) -> Any:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert logits(*(mode.from_tensor(given[name]) for name in given)).shape == want.shape
    causal = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    each = torch.vmap(lambda ids, mask: logits(ids[None], mask[None])[0])(given["input_ids"], causal)
    assert testing.relative_error(each, logits(given["input_ids"], causal)) < ONE_MODEL
    traced = torch.jit.trace(logits, (given["input_ids"], causal), check_trace=False)
    causal[:, :, 9:, 4] = False
    holes = traced(given["input_ids"], causal)
    assert testing.relative_error(holes, logits(given["input_ids"], causal)) < ONE_MODEL


@pytest.mark.parametrize("name", ["GptOss", "Gemma2"])
def test_sinks_and_softcaps_are_refused(name: str) -> None:
    """sdpa would compute something else, or raise in the first call."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, **({"num_local_experts": 4} if name == "GptOss" else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if name == "Gemma2" and model._supports_sdpa:
        pytest.skip("in this transformers sdpa leaves out Gemma 2's soft cap")
    want = model(**inputs("left")).logits
    with pytest.raises(ValueError, match=f'expected one that supports "sdpa", .* got a {name}ForCausalLM'):
        use(model)
    assert torch.equal(model(**inputs("left")).logits, want)
    model.set_attn_implementation(ours.NAME)  # selected by name, without checks
    with pytest.raises(ValueError, match=f"{'s_aux' if name == 'GptOss' else 'softcap'}: expected None, .*"):
        model(**inputs("left"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_lora(calls: Calls, reentrant: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    given = inputs("left")
    seen = given["attention_mask"]
    want = results(model, given, seen)
    pk.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = results(model.train(), given, seen)
    assert calls.ours == 4 and not calls.theirs  # each layer twice
    assert all(testing.relative_error(got[name], want[name]) < ONE_STEP for name in want if want[name].any())


def test_compiled(calls: Calls) -> None:
    model = llama().eval()
    want = model(**inputs("whole")).logits
    model.set_attn_implementation(ours.NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert testing.relative_error(compiled(**inputs("whole")).logits, want) < ONE_MODEL


def test_use(calls: Calls) -> None:
    for wrong, got in ((torch.nn.Linear(2, 2), "a Linear without one"), (3, "an int")):
        with pytest.raises(TypeError, match=f"model: expected a model of transformers, got {got}"):
            use(wrong)  # type: ignore[arg-type]
    model = llama().eval()
    want = model(**inputs("whole")).logits
    use(model)
    model(**inputs("whole"))
    assert calls.ours == 2 and "peft_kernels" not in str(model.config.to_dict())
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs("whole")).logits, want)


def test_use_of_several_models() -> None:
    """A teacher and its student in one module: all models are switched, or none if one is refused."""
    both = llama(), sliding()
    use(torch.nn.ModuleList([both[0], torch.nn.Sequential(both[1])]))
    assert [model.config._attn_implementation for model in both] == [ours.NAME] * 2

    class OwnAttention(transformers.LlamaForCausalLM):
        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return False

    other = llama()
    refused = OwnAttention(other.config)
    with pytest.raises(ValueError, match="an OwnAttention does not let its attention be chosen"):
        use(torch.nn.ModuleList([other, refused]))
    assert other.config._attn_implementation == "sdpa"


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("kind", ["whole", "left"])
@pytest.mark.parametrize("make", [llama, sliding, bert])
def test_patched(calls: Calls, make: Any, kind: str, tmp_path: Path) -> None:
    """Ours runs where the configuration says "sdpa", which it still says, also in what is saved."""
    model, given = make(), inputs(kind)
    if make is bert:
        given["labels"] = given["input_ids"]

    def step(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(**given)
        (out.logits.float() ** 2).mean().backward()
        return {"logits": out.logits.detach(), **gradients(model)}

    want = step(model)
    with pk.patched(model) as report:
        got = step(model)
        assert (calls.ours, calls.theirs) == (2, 0), report.details()
        largest = max(float(one.abs().max()) for one in want.values())
        assert all(float((got[name] - want[name]).abs().max()) < ONE_MODEL * largest for name in want)
        configs = [one.config for one in model.modules() if hasattr(one, "config")]
        assert {config._attn_implementation for config in configs} == {"sdpa"}
        model.save_pretrained(tmp_path)
        assert "peft_kernels" not in (tmp_path / "config.json").read_text()
        model.set_attn_implementation("eager")
        step(model)
        assert calls.ours == 2 and "its attention function is 'eager'" in str(report) + report.details()
        model.set_attn_implementation("sdpa")
        copied = copy.deepcopy(model)
        step(copied)
        assert calls.ours == 4
    again = step(model)
    assert calls.ours == 4 and all(torch.equal(again[name], want[name]) for name in want)


def test_patched_without_attention(calls: Calls) -> None:
    model = llama().eval()
    pk.patch(model, without="attention")
    model(**inputs("whole"))
    assert not calls.ours
    pk.unpatch(model)
    pk.patch(model)
    model(**inputs("whole"))
    assert calls.ours == 2


def test_what_sdpa_ignores_stays_ignored_unless_ours_was_named(calls: Calls) -> None:
    model = llama()
    pk.patch(model)
    q = testing.tensor(1, 4, 5, 16)
    with contextlib.suppress(ValueError):  # by sdpa itself, in new versions
        ours.attention_forward(model.model.layers[0].self_attn, q, q, q, None, softcap=5.0)
    assert calls.theirs == 1 and not calls.ours


def test_foreign_sdpa_is_kept(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours.sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", theirs)
    for number, make in enumerate((bert, llama), 1):
        model = make().eval()
        report = pk.patch(model)
        model(**inputs("whole"))
        assert calls.theirs == 2 * number and not calls.ours and "theirs" in str(report)
    assert transformers.AttentionInterface._global_mapping["sdpa"] is theirs
