"""`pk.patch(model)`: transformers' models compute the loss without logits."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from flow_checks import Calls, assert_near, assert_same_numbers
from flow_models import adapted, in_fp64, llama
from loss_models import (
    BLOCK,
    MODELS,
    VOCABULARY,
    batch,
    disabled,
    family,
    losses_of,
    patched,
    step,
    without_noise,
)
from peft_models import gradients
from rounding import FAR, ONE_MODEL, ONE_STEP
from skips import require_pickles
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.patch.loss.lazy_logits import LazyLogits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    stock = MODELS[name]().to(dtype).train()
    for module in stock.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    stock.config.use_cache = False
    model, report = patched(stock)
    assert [entry.reason for entry in report.losses] == [""], report
    given = batch()
    truth_model = in_fp64(stock)
    truth = step(truth_model, given)
    with Calls() as calls:
        got = step(model, given)
    assert losses_of(calls) == 1
    parts = [without_noise(results, truth) for results in (got, step(stock, given), truth)]
    assert_same_numbers(lambda i: tuple(parts), 1e-3 if dtype == torch.float32 else 0.3)  # type: ignore[arg-type,return-value]
    pk.patch(stock, (*BLOCK, "loss"))  # patched LoRA layers round differently from PEFT's
    ours, theirs = (each(**given).logits for each in (model, stock))
    assert type(ours) is LazyLogits and torch.equal(ours, theirs)
    entry = report.losses[0]
    assert not entry.fallbacks and "1x by equal" in entry.note


OPTIONS: dict[str, dict[str, Any]] = {
    "items": {"num_items_in_batch": 50},
    "items-tensor": {"num_items_in_batch": torch.tensor(50)},
    "shift-labels": {"shift_labels": batch(3, 12)["input_ids"]},
    "ignore-index": {"ignore_index": 7},
    "tuple": {"return_dict": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_arguments_of_the_loss(option: str) -> None:
    stock = llama(vocab_size=VOCABULARY)
    model, _ = patched(stock)
    given = batch() | OPTIONS[option]
    if option == "ignore-index":
        given["labels"] = given["labels"].where(given["labels"] != -100, 7)
    with Calls() as calls:
        got = model(**given)
    assert losses_of(calls) == 1
    want = stock(**given)
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[1], want[1])
    positional = model(given["input_ids"], None, None, None, None, given["labels"])
    assert type(positional.logits) is LazyLogits


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_labels_has_gradients_of_zero(name: str) -> None:
    """The mean over no token is NaN, in torch too. A micro-batch of this kind leaves what others gave."""
    stock = MODELS[name]()
    model, _ = patched(stock)
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    with Calls() as calls:
        got = step(model, given)
    assert losses_of(calls) == 1
    assert got.pop("loss").isnan() and got and not any(g.any() for g in got.values())
    want = step(stock, given)
    assert want.pop("loss").isnan() and not any(g.any() for g in want.values())


def test_logits_to_keep() -> None:
    """The labels are those of the kept positions."""
    stock = llama(vocab_size=VOCABULARY)
    model, _ = patched(stock)
    given = batch() | {"logits_to_keep": 5}
    given["shift_labels"] = given["labels"][:, -5:].contiguous()
    torch.testing.assert_close(step(model, given), step(stock, given))


def test_auxiliary_loss_is_kept() -> None:
    """The load balancing loss of an MoE."""
    stock = family("mixtral", output_router_logits=True)
    model, _ = patched(stock)
    with Calls() as calls:
        got = step(model, batch())
    assert losses_of(calls) == 1
    want = step(stock, batch())
    assert got.keys() == want.keys()
    torch.testing.assert_close(without_noise(got, want), without_noise(want, want), rtol=FAR, atol=ONE_MODEL)


def test_the_head_alone_decides() -> None:
    """Whoever computes the loss, with labels or without, in training and evaluation. Not in generation, where
    the logits of one token of each sequence are read at once."""
    model, report = patched(llama(vocab_size=VOCABULARY))
    tokens = {"input_ids": batch()["input_ids"]}
    for each in (model.train(), model.eval()):
        assert type(each(**tokens).logits) is LazyLogits
        with torch.no_grad():
            assert type(each(**tokens).logits) is LazyLogits
            assert type(each(**tokens, logits_to_keep=1).logits) is Tensor
    assert type(model.generate(**tokens, max_new_tokens=2, do_sample=False)) is Tensor
    assert not report.losses[0].fallbacks and not report.losses[0].record.facts.reads


def wrapped_in_autocast(model: Any) -> None:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def wrapped_by_a_decorator(model: Any) -> None:
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


@pytest.mark.parametrize("wrap", [wrapped_in_autocast, wrapped_by_a_decorator])
def test_a_forward_wrapped_before_patch(wrap: Any) -> None:
    stock, model = MODELS["head-lora"](), MODELS["head-lora"]()
    for each in (stock, model):
        wrap(each.get_base_model())
    report = pk.patch(model, BLOCK)
    with Calls() as calls:
        loss = model(**batch()).loss
    assert losses_of(calls) == 1 and report.losses[0].fused, str(report)
    torch.testing.assert_close(loss, stock(**batch()).loss, rtol=0.02, atol=0.02)


def encoder_decoder() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes["vocab_size"] = VOCABULARY
    parts = [
        transformers.BertConfig(**sizes),
        transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True),
    ]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts, pad_token_id=0)
    torch.manual_seed(0)
    return transformers.EncoderDecoderModel(
        config.__class__(**config.to_dict() | {"decoder_start_token_id": 1})
    )


def vision_encoder_decoder() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    image = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    text = transformers.BertConfig(**sizes, vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    torch.manual_seed(0)
    return transformers.VisionEncoderDecoderModel(config)


@pytest.mark.parametrize("made", [encoder_decoder, vision_encoder_decoder])
def test_models_in_models(made: Any) -> None:
    """The loss is the outer model's, the head the inner one's: listed once."""
    stock = made().eval()
    model, report = patched(stock)
    given = batch()
    if made is vision_encoder_decoder:
        given["pixel_values"] = testing.tensor(len(given.pop("input_ids")), 3, 16, 16)
    with Calls() as calls:
        got = step(model, given)
    assert losses_of(calls) == 1 and [entry.name for entry in report.losses] == [""]
    want = step(stock, given)
    assert_near(without_noise(got, want), without_noise(want, want), ONE_STEP)
    assert not report.losses[0].record.facts.reads and not report.losses[0].fallbacks


def test_the_head_of_trained_tokens() -> None:
    """PEFT wraps a head that is tied to embeddings with `trainable_token_indices`."""
    stock = adapted(
        llama(vocab_size=VOCABULARY, tie_word_embeddings=True), trainable_token_indices=[5, 7, 60]
    )
    for name, delta in stock.named_parameters():
        if "trainable_tokens" in name:
            delta.data.add_(0.3)
    model, report = patched(stock)
    with Calls() as calls:
        got = step(model, batch())
    assert losses_of(calls) == 1 and report.losses[0].fused
    assert_near(got, step(stock, batch()), ONE_STEP)
    with disabled(model), disabled(stock):
        torch.testing.assert_close(model(**batch()).loss, stock(**batch()).loss)
    before, want = model(**batch()).logits, stock(**batch()).logits
    model.merge_adapter()
    stock.merge_adapter()
    torch.testing.assert_close(before, want, msg="read after the merge")
    out, want = model(**batch()), stock(**batch())
    model.unmerge_adapter()
    torch.testing.assert_close((out.loss, out.logits), (want.loss, want.logits), msg="read after unmerging")


def test_report() -> None:
    model = MODELS["head-lora"]()
    dry = pk.patch(model, dry_run=True)
    assert [entry.planned for entry in dry.losses] == [True]
    assert not pk.patch(model, "loss", dry_run=True).losses
    report = pk.patch(model)
    assert "loss without logits, LlamaForCausalLM: logits are computed where they are read" in str(report)
    assert "loss without logits" in pk.explain(model)
    assert pk.patch(model).losses[0].fused  # patching again
    assert pk.unpatch(model) and type(model(**batch()).logits) is Tensor
    with pk.patched(model):
        assert type(model(**batch()).logits) is LazyLogits
    assert type(model(**batch()).logits) is Tensor
    pk.patch(model, without="loss")
    assert not any("loss" in line for line in pk.explain(model).splitlines())
    late = pk.patch(model)
    assert "patched without the loss; unpatch first" in str(late)
    assert type(model(**batch()).logits) is Tensor


def dropout_before_the_adapter() -> tuple[Any, str]:
    return adapted(
        llama(vocab_size=VOCABULARY), target_modules=["lm_head"], lora_dropout=0.2
    ), "dropout before the adapter of the head"


def two_adapters() -> tuple[Any, str]:
    model = MODELS["head-lora"]()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    return model, "2 adapters of the head"


def hooks() -> tuple[Any, str]:
    model = MODELS["head-lora"]()
    model.get_output_embeddings().register_forward_hook(lambda *args: None)
    return model, "hooks on a Linear"


@pytest.mark.parametrize("case", [dropout_before_the_adapter, two_adapters, hooks])
def test_fallbacks_that_compute_logits(case: Any) -> None:
    model, words = case()
    report = pk.patch(model)
    assert type(model(**batch()).logits) is Tensor
    assert words in str(report) and report.losses[0].fallbacks.total() == 1


@pytest.mark.parametrize("when", ["foreign", "replaced", "late"])
def test_foreign_heads(when: str) -> None:
    """Foreign by class, by a forward on the instance, or because it was added after patch()."""
    model = llama(vocab_size=VOCABULARY)
    if when == "foreign":
        model.lm_head = torch.nn.Sequential(model.lm_head)
    elif when == "replaced":
        model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight)
    report = pk.patch(model)
    if when == "late":
        model.lm_head = torch.nn.Linear(64, VOCABULARY, bias=False)
    words = {"foreign": "its head is a Sequential", "replaced": "was replaced on the instance"}
    assert words.get(when, "was added after patch()") in str(report)
    with Calls() as calls:
        model(**batch()).loss.backward()
    assert losses_of(calls) == 0
    if when == "late":
        pk.patch(model)
        assert type(model(**batch()).logits) is LazyLogits and report.losses[0].fused


@pytest.mark.parametrize("backward_hook", [False, True])
def test_hooks_on_a_plain_head(backward_hook: bool) -> None:
    """Hooks run as usual; a backward hook needs the logits."""
    stock = llama(vocab_size=VOCABULARY)
    model, _ = patched(stock)
    for each in (model, stock):
        if backward_hook:
            each.lm_head.register_full_backward_hook(lambda m, given, got: (given[0] * 2,))
        else:
            each.lm_head.register_forward_hook(lambda m, x, y: y * 2)
    torch.testing.assert_close(step(model, batch()), step(stock, batch()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ["loss", "kl", "highest"])
def test_compiled_losses_and_metrics(function: str) -> None:
    functions: dict[str, Any] = {
        "loss": lambda out: F.cross_entropy(out.logits.flatten(0, 1), batch()["input_ids"].flatten()),
        "kl": lambda out: F.kl_div(out.logits.log_softmax(-1), torch.full((VOCABULARY,), 0.01)),
        "highest": lambda out: out.logits.argmax(-1).float().mean(),
    }
    torch.compiler.reset()
    stock = llama(vocab_size=VOCABULARY, num_hidden_layers=1)
    model, _ = patched(stock)
    compiled = torch.compile(functions[function], backend="aot_eager")
    for _ in range(2):
        got, want = compiled(model(**batch())), functions[function](stock(**batch()))
        torch.testing.assert_close(got, want)
    if function != "highest":
        for value in (got, want):
            value.backward()
        assert_near(gradients(model), gradients(stock))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_loss_in_one_graph_needs_plain_logits() -> None:
    ids = batch()["input_ids"].flatten()
    torch.compiler.reset()
    stock = llama(vocab_size=VOCABULARY, num_hidden_layers=1)
    want = F.cross_entropy(stock(**batch()).logits.flatten(0, 1), ids)
    loss: Any = torch.compile(
        lambda logits: F.cross_entropy(logits.flatten(0, 1), ids), backend="aot_eager", fullgraph=True
    )
    model, _ = patched(stock)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LazyLogits"):
        loss(model(**batch()).logits)
    torch.testing.assert_close(loss(model(**batch()).logits + 0), want)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_computes_logits() -> None:
    torch.compiler.reset()
    model, _ = patched(llama(vocab_size=VOCABULARY, num_hidden_layers=1))
    found = torch.compile(model, backend="eager")(**batch())
    torch.compiler.reset()
    assert type(found.logits) is Tensor
    torch.testing.assert_close(found.loss, model(**batch()).loss)


def test_copies_pickles_and_signature() -> None:
    stock = llama(vocab_size=VOCABULARY)
    model, _ = patched(stock)
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    inside, _ = patched(MODELS["head-frozen"]())
    for each in (model, inside):
        twin = copy.deepcopy(each)
        assert type(twin) is type(each) and type(twin(**batch()).logits) is LazyLogits
        assert twin.get_output_embeddings() is not each.get_output_embeddings()
    require_pickles(stock)
    plain = pickle.loads(pickle.dumps(model))
    assert type(plain) is type(stock) and type(plain(**batch()).logits) is Tensor


def test_several_models_at_once() -> None:
    """In threads, with and without labels, and a model called in another's forward."""
    model, other = patched(llama(vocab_size=VOCABULARY))[0], patched(llama(vocab_size=VOCABULARY))[0]
    inner: list[Any] = []
    handle = model.model.norm.register_forward_pre_hook(
        lambda *args: inner.append(other(input_ids=batch()["input_ids"]).logits)
    )
    assert type(model(**batch()).logits) is type(inner[0]) is LazyLogits
    handle.remove()
    with ThreadPoolExecutor(2) as pool:
        given = [batch(), {"input_ids": batch()["input_ids"]}] * 8
        kinds = list(pool.map(lambda each: type(model(**each).logits), given))
    assert kinds == [LazyLogits] * 16
