"""Serving under misuse: shared models, closed engines, interrupted steps."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import ADAPTERS, llama, prompt, save_adapter, small
from torch import Tensor

import peft_kernels as pk
from peft_kernels.core import dispatch
from peft_kernels.patch.fused import Fused
from peft_kernels.serving import Engine, Request, Sampling
from peft_kernels.serving.fair_lock import FairLock

NEW = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(llama(), folder / name, **ADAPTERS[name]) for name in ("one", "two")}


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(llama(), max_batch=3)
    yield engine
    engine.close()


def ask(engine: Engine, name: str | None = None, seed: int = 0, **options: Any) -> Request:
    return engine.submit(prompt(seed, 5), name, **{"max_new_tokens": NEW, "eos_token_id": ()} | options)


def test_long_request_does_not_switch_rotary_embedding_of_others() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    engine = Engine(small("Phi3", original_max_position_embeddings=16, rope_parameters=rope), max_batch=2)
    with pytest.raises(ValueError, match="expected at most 16 tokens in all, got 11 of the prompt and 6 new"):
        engine.submit(prompt(1, 11), max_new_tokens=6)
    alone = ask(engine, keep_logits=True)
    engine.run()
    engine.submit(prompt(1, 10), max_new_tokens=6, eos_token_id=())
    among = ask(engine, keep_logits=True)
    engine.run()
    assert all(torch.equal(a, b) for a, b in zip(alone.logits, among.logits, strict=True))


def test_attention_in_chunks_is_refused() -> None:
    """The cache holds more than the current chunk, and decoding by rows attends to all of it."""
    sizes = {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "head_dim": 16, "moe_layers": []}
    layers = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    with pytest.raises(TypeError, match=r"got chunked attention: Llama4ForCausalLM"):
        Engine(small("Llama4", "Llama4TextConfig", num_local_experts=2, **sizes, **layers))


def test_one_engine_per_model(folders: dict[str, Path]) -> None:
    model = llama()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="adapter_dtype"):
        Engine(model, adapter_dtype=torch.float16)  # raises, and leaves the model free
    first = Engine(model)
    first.load("one", folders["one"])
    with pytest.raises(TypeError, match="expected one that no other engine serves"):
        Engine(model)
    first.close()
    second = Engine(model)
    second.load("one", folders["one"])
    del second  # an engine that was never closed
    gc.collect()
    assert [type(m) for m in model.modules()] == classes
    pk.adapters.add(model, "mine")
    with pytest.raises(TypeError, match=r"expected the base without bottleneck adapters, .* got mine"):
        Engine(model)


def test_closed_engine_does_not_change_the_model(folders: dict[str, Path]) -> None:
    model = llama()
    engine = Engine(model)
    engine.register("one", folders["one"])
    engine.close()
    engine.close()
    for late in (
        lambda: engine.load("one"),
        lambda: engine.register("two", folders["two"]),
        lambda: engine.generate([[5]], ["one"], max_new_tokens=2),
        engine.start,
    ):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            late()


def test_close_while_a_folder_is_read(
    engine: Engine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = engine._decoder.model, engine._store.read
    assert any(isinstance(m, Fused) for m in model.modules())
    monkeypatch.setattr(engine._store, "read", lambda *args: (read(*args), engine.close())[0])
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.load("one", folders["one"])
    assert not any(isinstance(m, Fused) for m in model.modules())


def test_name_reassigned_while_its_folder_is_read(
    engine: Engine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = engine.generate([prompt(0, 5)], max_new_tokens=NEW, eos_token_id=())
    read = engine._store.read

    def meanwhile(name: str, folder: Path) -> Any:
        found = read(name, folder)
        monkeypatch.setattr(engine._store, "read", read)
        engine.unload("a")
        engine.register("a", folders["two"])
        return found

    engine.register("a", folders["one"])
    monkeypatch.setattr(engine._store, "read", meanwhile)
    with pytest.raises(ValueError, match="name: 'a' is the adapter in"):
        engine.load("a")
    got = engine.generate([prompt(0, 5)], ["a"], max_new_tokens=NEW, eos_token_id=())
    engine.load("two", folders["two"])
    assert got == engine.generate([prompt(0, 5)], ["two"], max_new_tokens=NEW, eos_token_id=()) != wanted


def test_name_is_free_after_its_adapter_did_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    narrow = save_adapter(llama(), tmp_path / "narrow", r=1, target_modules=["q_proj"])
    engine = Engine(llama(), budget_bytes=2000)
    with pytest.raises(ValueError, match="expected at most budget_bytes=2000 bytes"):
        engine.load("a", folders["one"])
    assert engine.adapters == []
    engine.load("a", narrow)
    assert engine.adapters[0].nbytes == 2 * 128 * 4


def test_invalid_logits_fail_only_their_request(engine: Engine) -> None:
    (wanted,) = engine.generate([prompt(0, 5)], max_new_tokens=NEW, eos_token_id=())
    bad, good = ask(engine, seed=1, sampling=Sampling(1.0, seed=0)), ask(engine)
    step = engine._decoder.step

    def broken(*args: Any) -> Tensor:
        logits = step(*args)
        logits[0] = torch.nan
        return logits

    engine._decoder.step = broken  # type: ignore[method-assign]
    engine.run()
    with pytest.raises(
        RuntimeError, match="logits: expected finite numbers, got nan as the largest for token 2:"
    ):
        bad.result()
    assert good.result() == wanted


def test_interrupted_step_is_not_resumed(engine: Engine) -> None:
    """By then some layers have cached the token and others have not."""
    (wanted,) = engine.generate([prompt(0, 5)], max_new_tokens=NEW, eos_token_id=())
    request = ask(engine)
    engine.step()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = engine._decoder.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    hook.remove()
    engine.run()
    with pytest.raises(RuntimeError, match="was interrupted"):
        request.result()
    assert engine.generate([prompt(0, 5)], max_new_tokens=NEW, eos_token_id=()) == [wanted]


def test_result_raises_when_the_engine_does_not_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is submitted just as `run` has found nothing left to do."""
    request, heard = ask(engine), []

    def wait() -> None:
        try:
            request.result(3)
        except Exception as error:
            heard.append(error)

    def last_step() -> bool:
        waiter.start()
        time.sleep(0.05)
        return False

    waiter = threading.Thread(target=wait)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", last_step)
        engine.run()
    waiter.join()
    assert [type(error) for error in heard] == [RuntimeError]
    with engine:
        assert len(request.result(60)) == NEW


def test_prompts_and_end_tokens_of_other_types(engine: Engine) -> None:
    (whole,) = engine.generate([torch.tensor(prompt(0, 5))], max_new_tokens=NEW, eos_token_id=())
    for end in (torch.tensor(whole[1]), torch.tensor([whole[1]]), {whole[1]}):
        assert engine.generate([prompt(0, 5)], max_new_tokens=NEW, eos_token_id=end) == [
            whole[: whole.index(whole[1]) + 1]
        ]
    for end in ("</s>", 2.0, [2.5], [[2]]):  # values that no token equals
        with pytest.raises(ValueError, match="eos_token_id: expected a token id or several, got"):
            engine.submit([5], max_new_tokens=2, eos_token_id=end)  # type: ignore[arg-type]
    for wrong in ([5.5], [[5, 6]], 5):
        with pytest.raises(ValueError, match="expected a text or a sequence of token ids, got"):
            engine.submit(wrong, max_new_tokens=NEW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a sequence of prompts, got a text"):
        engine.generate("text")
    with pytest.raises(ValueError, match="adapters: expected a sequence of names, got a text"):
        engine.generate([[5]], "a")


def test_untokenizable_text(engine: Engine) -> None:
    engine.tokenizer = lambda text: pytest.fail("it was asked")
    with pytest.raises(ValueError, match=r"prompt: expected a text that UTF-8 can hold, got '\\ud800' at 1"):
        engine.submit("a\ud800", max_new_tokens=2)


def test_invalid_arguments(engine: Engine) -> None:
    for options, message in (
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number, got 2.5"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a whole number, got None"),
        ({"sampling": 5}, "sampling: expected a Sampling, got 5"),
        ({"sampling": {}}, "sampling: expected a Sampling, got {}"),
        ({"adapter": ["one"]}, r"expected one that is registered \(none\), got \['one'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit([5], **{"max_new_tokens": 2} | options)  # type: ignore[arg-type]
    for sampling, message in (
        ({"top_k": 1.5}, "top_k: expected a whole number, got 1.5"),
        ({"temperature": "1"}, "temperature: expected a number, got '1'"),
        ({"temperature": None}, "temperature: expected a number, got None"),
        ({"top_p": [1]}, r"top_p: expected a number, got \[1\]"),
        ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
        ({"seed": 2**64}, "seed: expected one of 64 bits, got 18446744073709551616"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**sampling)  # type: ignore[arg-type]
    for wrong, message in (
        ({"max_batch": 1.5}, "max_batch: expected a whole number, got 1.5"),
        ({"budget_bytes": -1}, "budget_bytes: expected at least 0, got -1"),
        ({"budget_bytes": "1G"}, "budget_bytes: expected a whole number, got '1G'"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(llama(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-3, 1e-36, 1e-320])
def test_low_temperatures_pick_the_likeliest(temperature: float) -> None:
    """Down to temperatures that fp32 logits cannot be divided by."""
    logits = torch.tensor([-3e38, -1e4, 2.0, 90.0, 1.0])
    request = Request([1], None, 4, frozenset(), Sampling(temperature, seed=0), False, lambda: True)
    while not request.done:
        request.take(logits)
    assert request.result() == [3] * 4


def test_64_bit_seeds() -> None:
    for seed in (-(2**63), 2**64 - 1):
        request = Request([1], None, 1, frozenset(), Sampling(1.0, seed=seed), False, lambda: True)
        request.take(torch.zeros(3))
        assert request.finish_reason == "length"


def test_calls_between_steps_get_the_lock(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stepping thread takes the lock again at once."""
    step, steps, waited = engine._decoder.step, [0], []

    def slow(*args: Any) -> Tensor:
        steps[0] += 1
        time.sleep(0.005)
        return step(*args)

    monkeypatch.setattr(engine._decoder, "step", slow)
    with engine:
        request = ask(engine, max_new_tokens=55)
        next(iter(request))
        for _ in range(5):
            before = steps[0]
            assert engine.adapters == [] and not request.done
            waited.append(steps[0] - before)
    assert max(waited) <= 2, waited


def test_polling_does_not_block_steps(engine: Engine) -> None:
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            assert engine.adapters == []

    pollers = [threading.Thread(target=poll) for _ in range(2)]
    with engine:
        for poller in pollers:
            poller.start()
        try:
            assert len(ask(engine, max_new_tokens=40).result(30)) == 40
        finally:
            stop.set()
            for poller in pollers:
                poller.join()


def test_lock_is_reentrant() -> None:
    lock, got = FairLock(), []

    def other() -> None:
        with lock:
            got.append(len(got))

    with lock:
        waiter = threading.Thread(target=other)
        waiter.start()
        time.sleep(0.02)  # it holds the lock by now
        with lock:
            pass
        assert got == []
    waiter.join(5)
    assert got == [0]


def test_interrupted_generate_cancels_its_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller has no handle to them."""
    started: list[Any] = []

    def interrupt(prompt: Any, rows: Any) -> Any:
        started.append(prompt)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5], [6], [7]], max_new_tokens=NEW)
    assert not engine.step() and len(started) == 1


def test_engine_thread_inherits_the_back_end(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama())
    engine.load("one", folders["one"])
    seen, step = [], engine._decoder.step

    def spy(*args: Any) -> Tensor:
        seen.append(dispatch.forced())
        return step(*args)

    monkeypatch.setattr(engine._decoder, "step", spy)
    with pk.use_backend("reference"), engine:
        engine.generate([[5, 6]], ["one"], max_new_tokens=3, eos_token_id=())
    assert set(seen) == {"reference"}


def test_loaded_adapter_is_not_reread(tmp_path: Path) -> None:
    folder = save_adapter(llama(), tmp_path / "a", **ADAPTERS["one"])
    engine = Engine(llama())

    def answer() -> list[int]:
        return engine.generate([prompt(0, 5)], ["a"], max_new_tokens=NEW, eos_token_id=())[0]

    engine.load("a", folder)
    before = answer()
    save_adapter(llama(), folder, seed=7, **ADAPTERS["two"])
    engine.load("a", folder)
    assert answer() == before
    engine.unload("a")
    engine.load("a", folder)
    assert answer() != before
