"""Serving: each request of a batch gets what it would get alone, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import BF16, ONE_MODEL, ONE_STEP
from serving_models import (
    ADAPTERS,
    FAMILIES,
    by_generate,
    family,
    llama,
    prompt,
    save_adapter,
    save_adapters,
    save_bottleneck,
)

import peft_kernels as pk
import testing
from peft_kernels.serving import Engine, Request, Sampling

NEW = 6
NAMES = [None, *ADAPTERS]
BASES = [("nf4", torch.bfloat16), ("nf4", torch.float32), ("dense", torch.float32), ("dense", torch.bfloat16)]


@pytest.fixture(scope="module", params=BASES, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    base, dtype = request.param
    folders = save_adapters(llama(base, dtype), tmp_path_factory.mktemp("adapters"))
    engine = Engine(llama(base, dtype), max_batch=5)
    for name, folder in folders.items():
        engine.register(name, folder)
    yield engine, folders, lambda: llama(base, dtype)
    engine.close()


def ask(engine: Engine, name: str | None, seed: int = 0, **options: Any) -> Request:
    options = {"max_new_tokens": NEW, "eos_token_id": (), "keep_logits": True} | options
    return engine.submit(prompt(seed, 4 + seed), name, **options)


def same_bits(a: Request, b: Request) -> None:
    assert a.tokens == b.tokens
    assert len(a.logits) == NEW
    for left, right in zip(a.logits, b.logits, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_other_requests_change_no_bit(served: Any, name: str | None) -> None:
    engine, _, _ = served
    alone = ask(engine, name)
    engine.run()
    # Among requests for every adapter, its own too, longer and shorter, submitted before and after it.
    before = [ask(engine, other, seed, max_new_tokens=seed) for seed, other in enumerate(NAMES[:1:-1], 2)]
    engine.step()
    before.append(engine.submit(prompt(99, 4), "two", max_new_tokens=NEW, eos_token_id=()))  # equal length
    among = ask(engine, name)
    after = [ask(engine, other, seed) for seed, other in enumerate([name, *NAMES], 7)]
    engine.run()
    assert all(request.finish_reason == "length" for request in (*before, *after))
    same_bits(among, alone)


def test_mixed_requests_equal_generate_of_each(served: Any) -> None:
    engine, folders, model = served
    requests = [ask(engine, name, seed) for seed, name in enumerate(NAMES)]
    engine.run()
    texts = set()
    for seed, (name, request) in enumerate(zip(NAMES, requests, strict=True)):
        tokens, logits = by_generate(model(), prompt(seed, 4 + seed), NEW, name and folders[name])
        exact = request.logits[0].dtype == torch.float32  # generate's logits are always in fp32
        for got, want in zip(request.logits, logits, strict=True):
            assert testing.relative_error(got, want) < (ONE_MODEL if exact else 3 * BF16)
            if not exact and got.argmax() != want.argmax():
                break  # a tie in bf16: the texts differ from here
        else:
            assert request.tokens == tokens
        texts.add(tuple(request.tokens))
    assert len(texts) > 3  # adapters change outputs


def test_one_row_equals_plain_decoding_bit_for_bit(tmp_path: Path) -> None:
    """Without padding, and with as many key heads as query heads, whose attention takes the usual path."""
    import models

    def model() -> Any:
        found = models.tiny_llama(initializer_range=0.2, num_key_value_heads=4, pad_token_id=0)
        return models.to_base(found.to(torch.bfloat16).eval(), "nf4")

    folder = save_adapter(model(), tmp_path / "a", **ADAPTERS["one"])
    engine = Engine(model(), max_batch=3)
    engine.load("a", folder)
    for name in ("a", None):
        request = ask(engine, name)
        ask(engine, None, 2)
        ask(engine, "a", 3)
        engine.run()
        tokens, logits = by_generate(model(), prompt(0, 4), NEW, folder if name else None)
        assert request.tokens == tokens
        assert all(torch.equal(got, want) for got, want in zip(request.logits, logits, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    """Transposed weights with biases, sliding windows, biases, custom attention."""
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else "all-linear"
    options: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": name == "gpt2"}
    kinds = {kind: ADAPTERS[kind] for kind in ("one", "dora")}
    folders = {kind: save_adapter(family(name), tmp_path / kind, **kinds[kind] | options) for kind in kinds}
    engine = Engine(family(name), max_batch=4)
    for kind, folder in folders.items():
        engine.register(kind, folder)
    requests = [ask(engine, kind, seed) for seed, kind in enumerate(("one", None, "dora"))]
    engine.run()
    for seed, request in enumerate(requests):
        folder = folders.get(request.adapter or "")
        tokens, logits = by_generate(family(name), prompt(seed, 4 + seed), NEW, folder)
        assert request.tokens == tokens
        assert testing.relative_error(request.logits[-1], logits[-1]) < ONE_STEP


@pytest.mark.skipif(not hasattr(pk.adapters, "rows"), reason="no bottleneck adapters by rows")
def test_bottleneck_adapters_beside_lora(tmp_path: Path) -> None:
    engine, folders = Engine(llama("nf4"), max_batch=4), {"lora": tmp_path / "lora"}
    save_adapter(llama("nf4"), folders["lora"], **ADAPTERS["one"])
    for kind in ("houlsby", "parallel"):
        folders[kind] = save_bottleneck(llama("nf4"), tmp_path / kind, kind)
    for name, folder in folders.items():
        engine.register(name, folder)
    names = ["houlsby", "lora", None, "parallel", "houlsby"]
    requests = [ask(engine, name, seed) for seed, name in enumerate(names)]
    engine.run()
    assert all(one.nbytes for one in engine.adapters)
    for seed, (name, request) in enumerate(zip(names, requests, strict=True)):
        model = llama("nf4")
        lora = folders["lora"] if name == "lora" else None
        if name in ("houlsby", "parallel"):
            pk.adapters.load(model, folders[name], load_as=name)
            pk.adapters.set_active(model, name)
        tokens, logits = by_generate(model, prompt(seed, 4 + seed), NEW, lora)
        assert request.tokens == tokens
        assert testing.relative_error(request.logits[-1], logits[-1]) < ONE_MODEL
        alone = ask(engine, name, seed)
        engine.run()
        same_bits(request, alone)
    engine.unload("houlsby")
    engine.close()
    assert pk.adapters.names(engine._decoder.model) == []


def test_sampling_does_not_depend_on_other_requests(served: Any) -> None:
    engine, _, _ = served
    how = Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=5)
    alone = ask(engine, "one", sampling=how)
    engine.run()
    among = [ask(engine, "one", sampling=how) if i == 2 else ask(engine, "two", i) for i in range(5)][2]
    other = ask(engine, "one", sampling=Sampling(temperature=1.5, seed=6))
    engine.run()
    same_bits(among, alone)
    assert other.tokens != alone.tokens
    assert ask(engine, "one", sampling=Sampling(temperature=1.0, top_k=1)).sampling.top_k == 1
    engine.run()


def test_sampled_tokens_are_allowed() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    request = Request([1], None, 400, frozenset(), Sampling(1.0, top_k=3, seed=0), False, lambda: True)
    while not request.done:
        request.take(logits)
    assert set(request.tokens) == {1, 2, 3}
    request = Request([1], None, 400, frozenset(), Sampling(1.0, top_p=0.65, seed=0), False, lambda: True)
    while not request.done:
        request.take(logits)
    assert set(request.tokens) == {2, 3}
    assert abs(request.tokens.count(3) / 400 - 4 / 7) < 0.1


def test_close_restores_the_model(tmp_path: Path) -> None:
    model = llama("nf4")
    ids = torch.tensor([prompt(1, 9)])
    classes, names = [type(m) for m in model.modules()], model.config._attn_implementation
    with torch.no_grad():
        before = model(input_ids=ids).logits
    with Engine(model) as engine:
        engine.load("one", save_adapter(llama("nf4"), tmp_path / "one", **ADAPTERS["one"]))
        assert ask(engine, "one").result(60)
        assert [type(m) for m in model.modules()] != classes
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, before)  # no adapters between steps
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == names
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    import peft
    import transformers

    with pytest.raises(TypeError, match="without adapters of PEFT"):
        Engine(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).eval())
    with pytest.raises(TypeError, match=r"model.eval\(\)"):
        Engine(llama().train())
    with pytest.raises(TypeError, match="a causal language model of transformers, got NF4Linear"):
        Engine(pk.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)).eval())
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    with pytest.raises(TypeError, match="position_ids, got BloomForCausalLM"):
        Engine(transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).eval())
    with pytest.raises(ValueError, match="max_batch: expected at least 1, got 0"):
        Engine(llama(), max_batch=0)
    with pytest.raises(ValueError, match="adapter_dtype"):
        Engine(llama(), adapter_dtype=torch.bfloat16)
