"""Adapters load and unload while requests run, and a damaged one affects no other."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from serving_models import ADAPTERS, llama, prompt, save_adapter, save_adapters, save_bottleneck

import peft_kernels as pk
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.serving import Engine, Request

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

NEW = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(llama(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(llama(), max_batch=3)
    yield engine
    engine.close()


def ask(engine: Engine, name: str | None, seed: int = 0, new: int = NEW) -> Request:
    return engine.submit(prompt(seed, 5), name, max_new_tokens=new, eos_token_id=())


def resident(engine: Engine) -> list[str]:
    return [one.name for one in engine.adapters if one.nbytes]


def test_budget_evicts_the_least_recently_used(folders: dict[str, Path]) -> None:
    free = Engine(llama(), max_batch=2)
    for name, folder in folders.items():
        free.load(name, folder)
    sizes = {one.name: one.nbytes for one in free.adapters}
    on_disk = safetensors.load_file(folders["one"] / "adapter_model.safetensors")
    assert sizes["one"] == sum(t.nbytes for t in on_disk.values())
    wanted = [free.generate([prompt(1, 5)], [name], max_new_tokens=NEW)[0] for name in folders]
    free.close()

    budget = sizes["one"] + sizes["two"] + sizes["narrow"]
    engine = Engine(llama(), max_batch=2, budget_bytes=budget)
    for name, folder in folders.items():
        engine.register(name, folder)
    assert resident(engine) == []
    for name in ("one", "two", "narrow", "one"):
        ask(engine, name)
        engine.run()
    assert resident(engine) == ["two", "narrow", "one"]
    ask(engine, "dora")
    engine.run()
    assert sum(one.nbytes for one in engine.adapters) <= budget
    assert "two" not in resident(engine) and resident(engine)[-2:] == ["one", "dora"]
    # Every adapter, with many more requests than slots: results as with all in memory.
    requests = [engine.submit(prompt(1, 5), name, max_new_tokens=NEW) for name in [*folders] * 3]
    most = 0
    while engine.step():
        most = max(most, sum(one.nbytes for one in engine.adapters))
    assert most <= budget
    assert [request.result() for request in requests] == wanted * 3


def test_adapter_in_use_is_not_evicted(folders: dict[str, Path]) -> None:
    engine = Engine(llama(), max_batch=2)
    engine.load("one", folders["one"])
    engine.load("two", folders["two"])
    sizes = {one.name: one.nbytes for one in engine.adapters}
    engine.close()
    engine = Engine(llama(), max_batch=2, budget_bytes=max(sizes.values()))
    engine.register("one", folders["one"])
    engine.register("two", folders["two"])
    first, second = ask(engine, "one", new=6), ask(engine, "two", new=2)
    while not first.done:
        engine.step()
        assert first.done or (resident(engine) == ["one"] and not second.tokens)
        if not first.done:
            with pytest.raises(ValueError, match="expected room in budget_bytes next to adapters in use"):
                engine.load("two")
            with pytest.raises(ValueError, match="'one': expected no requests that use it, got 1"):
                engine.unload("one")
    engine.run()
    assert len(second.result()) == 2 and resident(engine) == ["two"]
    engine.unload("one")
    engine.unload("two")
    assert engine.adapters == []
    with pytest.raises(ValueError, match=r"expected one that is registered \(none\), got 'two'"):
        ask(engine, "two")


def test_adapter_larger_than_the_budget(folders: dict[str, Path]) -> None:
    engine = Engine(llama(), max_batch=2, budget_bytes=1000)
    engine.register("one", folders["one"])
    bad, good = ask(engine, "one"), ask(engine, None)
    engine.run()
    with pytest.raises(ValueError, match="'one': expected at most budget_bytes=1000 bytes, got"):
        bad.result()
    assert len(good.result()) == NEW and resident(engine) == []


def test_weights_that_overflow_in_the_adapter_dtype(tmp_path: Path) -> None:
    folder = save_adapter(llama("dense", torch.bfloat16), tmp_path / "a", **ADAPTERS["one"])
    path = folder / "adapter_model.safetensors"
    state = safetensors.load_file(path)
    next(iter(state.values()))[0, 0] = 3.4e38  # below fp32's maximum, and above bf16's
    safetensors.save_file(state, path)
    engine = Engine(llama("dense", torch.bfloat16), adapter_dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"expected finite numbers in torch\.bfloat16, got NaN or Inf"):
        engine.load("a", folder)


@pytest.mark.parametrize(
    ("dtype", "tensor", "value", "weight"),
    [
        (torch.float16, "up_proj.lora_A", 3e6, r"mlp.up_proj: lora_A up to 3e\+06,"),
        (torch.float16, "up_proj.lora_B", 3e6, r"mlp.up_proj: .*, lora_B up to 3e\+06,"),
        (torch.bfloat16, "k_proj.lora_A", 3.4e38, r"self_attn.k_proj: lora_A up to 3.4e\+38,"),
        (torch.float32, "up_proj.lora_magnitude", 3e38, r"mlp.up_proj: .*, magnitude/norm up to .*e\+3"),
        (torch.float32, "", 0.0, r".*: .*, scaling up to 1.2e\+37"),
    ],
    ids=["A-fp16", "B-fp16", "A-bf16", "magnitude", "scaling"],
)
def test_weights_that_overflow_in_the_models_dtype(
    tmp_path: Path, dtype: torch.dtype, tensor: str, value: float, weight: str
) -> None:
    """They are finite in the file and in fp32."""
    options = {"r": 8, "lora_alpha": 16.0 if tensor else 1e38, "use_dora": "magnitude" in tensor}
    folder = save_adapter(llama("dense", dtype), tmp_path / "a", **options)
    path = folder / "adapter_model.safetensors"
    state = safetensors.load_file(path)
    next(value for key, value in state.items() if tensor in key).fill_(value or 1.0)
    safetensors.save_file(state, path)
    engine = Engine(llama("dense", dtype), max_batch=2)
    told = rf"adapter 'a': expected finite logits in {dtype}, got NaN or Inf: .* in model.layers.0.{weight}"
    with pytest.raises(CheckpointError, match=told):
        engine.load("a", folder)
    assert engine.adapters == []
    engine.register("a", folder)
    bad, good = ask(engine, "a"), ask(engine, None)
    engine.run()
    with pytest.raises(CheckpointError, match=told):
        bad.result()
    assert len(good.result()) == NEW


def test_bottleneck_weights_that_overflow(tmp_path: Path) -> None:
    model = llama()
    folder = save_bottleneck(llama(), tmp_path, "pfeiffer")
    path = folder / "bottleneck_adapter.safetensors"
    state = safetensors.load_file(path)
    state[next(key for key in state if key.endswith("down_proj.up"))][0, 0] = 3.4e38
    safetensors.save_file(state, path)
    engine = Engine(model)
    with pytest.raises(CheckpointError, match=r"'a': .* in .*mlp.down_proj: .* up up to 3.4e\+38"):
        engine.load("a", folder)
    assert engine.adapters == []
    engine.load("a", save_bottleneck(llama(), tmp_path / "good", "pfeiffer"))


Damage = Callable[[Path], None]


def _tensors(change: Callable[[dict[str, Any], str], Any]) -> Damage:
    return lambda folder: change_tensors(
        folder / "adapter_model.safetensors",
        lambda state: change(state, next(key for key in state if key.endswith("v_proj.lora_A.weight"))),
    )


def _config(**values: Any) -> Damage:
    return lambda folder: change_json(folder / "adapter_config.json", **values)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _rename_layer(path: str) -> Damage:
    """Renames the tensors of one layer to another path."""

    def change(state: dict[str, Any], key: str) -> None:
        old = key.removesuffix("lora_A.weight")
        for part in ("lora_A.weight", "lora_B.weight"):
            state[path + part] = state.pop(old + part)

    return _tensors(change)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (_truncate, "adapter_model.safetensors: "),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "expected adapter_config.json, got none"),
    "no-weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "expected adapter_model.safetensors",
    ),
    "no-json": (lambda f: (f / "adapter_config.json").write_text("{"), "expected a JSON object"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "expected peft_type 'LORA', got"),
    "other-method": (_config(peft_type="IA3"), "expected peft_type 'LORA', got IA3"),
    "heads": (_config(modules_to_save=["lm_head"]), "modules_to_save: expected none"),
    "biases": (_config(bias="all"), "bias: expected 'none', got all"),
    "pissa": (_config(init_lora_weights="pissa"), "expected one that leaves the base as it is, got pissa"),
    "rank": (_config(r=5), "expected r=5 as adapter_config.json has it, got 8"),
    "alpha": (_config(lora_alpha="x"), "lora_alpha: expected a number, got x"),
    "pattern": (_config(alpha_pattern={"(": 1}), r"alpha_pattern: expected names .* got \("),
    "repeated": (_config(alpha_pattern={"a{99999999999}": 1}), "alpha_pattern: expected names .* got a"),
    "huge": (_config(lora_alpha=10**400), "lora_alpha: expected a number, got 1000"),
    "no-rank": (
        _tensors(
            lambda s, k: s.update({k: s[k][:0], k.replace("_A", "_B"): s[k.replace("_A", "_B")][:, :0]})
        ),
        "expected a rank of at least 1, got 0",
    ),
    "dora": (_config(use_dora=True), "expected a, b, magnitude, got a, b"),
    "nan": (
        _tensors(lambda s, k: s[k].view(-1)[3].fill_(torch.nan)),
        "expected finite numbers in torch.float32, got NaN or Inf",
    ),
    "half": (_tensors(lambda s, k: s.pop(k)), "expected a, b, got b"),
    "shape": (_tensors(lambda s, k: s.update({k: s[k][:, :-1]})), r"expected shape \(8, 64\), got \(8, 63\)"),
    "int": (
        _tensors(lambda s, k: s.update({k: s[k].long()})),
        "expected a matrix of fp32, bf16 or fp16, got",
    ),
    "elsewhere": (
        _rename_layer("base_model.model.model.layers.9."),
        "expected a layer of this model",
    ),
    "no-linear": (_rename_layer("base_model.model.model.norm."), "expected a linear layer"),
    "foreign": (
        _rename_layer("else."),
        "else.lora_A.weight: expected a name that starts with base_model",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapter_fails_only_its_request(
    name: str, engine: Engine, folders: dict[str, Path], tmp_path: Path
) -> None:
    damage, message = DAMAGES[name]
    good = ask(engine, None)
    shutil.copytree(folders["one"], tmp_path / "bad")
    damage(tmp_path / "bad")
    engine.register("bad", tmp_path / "bad")
    bad, later = ask(engine, "bad"), ask(engine, None)
    engine.run()
    assert good.result() == later.result() and len(good.tokens) == NEW
    assert bad.finish_reason == "error" and bad.tokens == []
    with pytest.raises(CheckpointError, match=message):
        bad.result()
    with pytest.raises(CheckpointError, match=message):
        engine.load("again", tmp_path / "bad")
    assert [one.name for one in engine.adapters] == ["bad"] and resident(engine) == []
    engine.unload("bad")


def test_invalid_requests_raise_on_submit(engine: Engine, folders: dict[str, Path]) -> None:
    engine.register("one", folders["one"])
    for options, message in (
        ({"prompt": []}, "expected at least one token, got none"),
        ({"prompt": [128]}, "expected tokens below 128, got 128"),
        ({"prompt": "text"}, "has no tokenizer, got a text"),
        ({"adapter": "two"}, r"expected one that is registered \(one\), got 'two'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 62}, "expected at most 64 tokens in all, got 3 of the prompt and 62 new ones"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(**{"prompt": [5, 6, 7], "max_new_tokens": 4} | options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name: 'one' is the adapter in"):
        engine.register("one", folders["two"])
    with pytest.raises(ValueError, match="expected letters, digits"):
        engine.register("a.b", folders["two"])
    with pytest.raises(ValueError, match="got 'two'"):
        engine.generate([[5], [6]], ["one", "two"], max_new_tokens=4)
    request = ask(engine, "one")
    with pytest.raises(RuntimeError, match=r"expected engine.start\(\) or engine.run\(\) beforehand"):
        request.result()
    request.cancel()
    assert not engine.step() and request.finish_reason == "cancelled" and request.result() == []
    engine.unload("one")


def test_stopped_and_cancelled_requests_free_their_slots(engine: Engine) -> None:
    (whole,) = engine.generate([prompt(0, 5)], max_new_tokens=8, eos_token_id=())
    stop = next(token for token in whole if whole.index(token) > 0)
    stopped = engine.submit(prompt(0, 5), max_new_tokens=8, eos_token_id=stop)
    cancelled = ask(engine, None, new=40)
    waiting = [ask(engine, None, seed) for seed in range(3)]
    engine.step()
    assert [bool(request.tokens) for request in waiting] == [True, False, False]
    cancelled.cancel()
    engine.run()
    assert stopped.finish_reason == "stop" and stopped.tokens == whole[: whole.index(stop) + 1]
    assert len(cancelled.tokens) < 4 and all(request.finish_reason == "length" for request in waiting)


def test_adapters_load_and_unload_while_requests_run(folders: dict[str, Path]) -> None:
    wanted = {}
    for name in ("one", "two", "dora"):
        with Engine(llama()) as alone:
            alone.register(name, folders[name])
            wanted[name] = ask(alone, name, new=20).result(60)
    faults: list[BaseException] = []
    with Engine(llama(), max_batch=3) as engine:
        engine.load("one", folders["one"])

        def client(name: str) -> None:
            try:
                for number in range(3):
                    known = name if name == "one" else f"{name}-{number}"
                    engine.load(known, folders[name])
                    assert list(ask(engine, known, new=20)) == wanted[name]  # read while they arrive
                    if known != "one":
                        engine.unload(known)
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=client, args=(name,)) for name in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert faults == []
        assert [one.name for one in engine.adapters] == ["one"]


def test_failed_step_ends_only_running_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    running, step = ask(engine, None, new=9), engine._decoder.step
    engine.step()
    monkeypatch.setattr(engine._decoder, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    engine.step()
    monkeypatch.setattr(engine._decoder, "step", step)
    later = ask(engine, None)
    engine.run()
    with pytest.raises(RuntimeError, match="no memory"):
        running.result()
    assert len(later.result()) == NEW


def test_importing_the_package_needs_no_transformers(python: Any) -> None:
    code = "import sys, peft_kernels as pk; pk.serving.Sampling(); print('transformers' in sys.modules)"
    assert python(code).stdout.strip() == "False"


def test_public_names() -> None:
    assert pk.serving.Engine is Engine
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        pk.serving.Server  # noqa: B018
