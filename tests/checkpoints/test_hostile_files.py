"""Time and memory spent on an untrusted folder are bounded."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors, write
from serving_models import llama, prompt, save_adapter, save_bottleneck

import peft_kernels as pk
from peft_kernels.checkpoints.checks import nf4_weights
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError, Entry, read_header, shown
from peft_kernels.serving import Engine

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@contextmanager
def time_limit(most: float, timer: int = signal.ITIMER_VIRTUAL) -> Iterator[None]:
    """Limits CPU or wall time. The code needs a tenth of it, and took minutes before it was bounded."""

    def raise_timeout(*_: Any) -> None:
        raise AssertionError(f"not done after {most} seconds")

    which = signal.SIGALRM if timer == signal.ITIMER_REAL else signal.SIGVTALRM
    before = signal.signal(which, raise_timeout)
    signal.setitimer(timer, most)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(which, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(llama(), tmp_path / "adapter", r=8, lora_alpha=16)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(llama(), max_batch=2, budget_bytes=1_000_000)
    yield engine
    engine.close()


def refused(engine: Engine, folder: Path, message: str) -> None:
    """Loading fails; other adapters are still served."""
    with time_limit(10), pytest.raises(ValueError, match=message):
        engine.load("bad", folder)
    assert engine.adapters == [] and len(engine.generate([prompt(0, 3)], max_new_tokens=2)[0]) <= 2


def test_duplicate_name_among_many(tmp_path: Path) -> None:
    item = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    names = [item.format(f"{i:05}") for i in range(40_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with time_limit(8), pytest.raises(CheckpointError, match="39999 stands twice in the header"):
        read_header(path)


def test_error_quotes_little_of_a_large_header() -> None:
    with time_limit(2):
        assert len(shown("x\n" * 30_000_000)) < 150


def test_many_keys_under_one_weight() -> None:
    names = {f"w.weight.{i}": None for i in range(60_000)} | {"w.weight": None, "w.weight.absmax": None}
    with time_limit(8):
        found = nf4_weights(names)
    assert list(found) == ["w.weight"] and found["w.weight"][:2] == ["w.weight", "w.weight.absmax"]
    assert len(found["w.weight"]) == 60_002


def test_backtracking_pattern(engine: Engine, folder: Path) -> None:
    change_json(folder / "adapter_config.json", alpha_pattern={"(.*.*)*.*.*(.*.*)*x": 1})
    with time_limit(10):
        engine.load("good", folder)  # matched in time, and matches no layer
    engine.unload("good")
    change_json(folder / "adapter_config.json", alpha_pattern={r"(.)\1": 1})
    refused(engine, folder, r"alpha_pattern: expected names of layers, or patterns of .* got \(.\)")


def test_too_many_pattern_steps(engine: Engine, folder: Path) -> None:
    change_json(folder / "adapter_config.json", alpha_pattern={f"((.*)*)*{i}": i for i in range(2000)})
    refused(
        engine,
        folder,
        "adapter_config.json: alpha_pattern: expected patterns that match within 5000000 steps",
    )


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "bottleneck_adapter.json"]
)
def test_pipes_and_devices_are_not_read(name: str, engine: Engine, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with time_limit(10, signal.ITIMER_REAL):
        refused(engine, folder, f"{name}, got none|{name}: expected a regular file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/null")  # harmless, unlike /dev/zero
    refused(engine, folder, f"{name}, got none|{name}: expected a regular file")


def test_configuration_that_is_a_pipe(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"x": torch.zeros(3)})
    os.mkfifo(tmp_path / "config.json")
    with time_limit(10, signal.ITIMER_REAL):
        assert Checkpoint.examine(tmp_path).faults == [
            "config.json: expected a regular file, got something else"
        ]


def test_oversized_adapter_header(engine: Engine, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 11_000_000) + b" " * 11_000_000)
    refused(engine, folder, "expected a header of at most 10000000 bytes, got one of 11000000")
    (folder / "adapter_config.json").write_bytes(b" " * 10_000_001)
    refused(engine, folder, "adapter_config.json: expected at most 10000000 bytes of JSON, got more")


def test_layer_under_an_alias(engine: Engine, folder: Path) -> None:
    """`model.base_model.x` is `model.x`."""
    change_tensors(
        folder / "adapter_model.safetensors",
        lambda s: s.update({k.replace(".model.layers", ".base_model.layers"): s[k] for k in list(s)}),
    )
    refused(engine, folder, "base_model.layers.0.* expected a layer of this model")


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_weights_beyond_the_budget_are_not_read(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bottleneck":
        folder = save_bottleneck(llama(), tmp_path / "bottleneck", "houlsby")
    engine = Engine(llama(), budget_bytes=2000)
    monkeypatch.setattr(Entry, "read", lambda self: pytest.fail("it was read"))
    refused(engine, folder, "adapter 'bad': expected at most budget_bytes=2000 bytes, got")
    engine.close()


def test_oversized_bottleneck_adapters(tmp_path: Path) -> None:
    model = llama()
    folder = save_bottleneck(model, tmp_path / "adapter", "houlsby")
    (folder / "bottleneck_adapter.json").write_bytes(b" " * 1_000_001)
    with pytest.raises(CheckpointError, match="expected at most 1000000 bytes of JSON, got more"):
        pk.adapters.load(model, folder, load_as="other")
