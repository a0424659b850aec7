"""Bottleneck adapters on disk: round trips, and damaged or foreign files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_models import FAMILIES, output, stir
from checkpoint_damage import change_json, change_tensors

import peft_kernels as pk
from peft_kernels.adapters import AdapterConfig
from peft_kernels.adapters.config import config_of
from peft_kernels.adapters.files import CONFIG, WEIGHTS
from peft_kernels.adapters.site import AdapterSite
from peft_kernels.checkpoints.header import CheckpointError

adapters = pk.adapters
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with an adapter, "task", and the folder it is saved in."""
    model, folder = FAMILIES["bert"].make(), tmp_path_factory.mktemp("adapter") / "task"
    adapters.add(model, "task", AdapterConfig.houlsby(norm=True, scaling=0.5))
    stir(model, "task")
    adapters.save(model, "task", folder)
    return model, folder


def test_round_trip(trained: tuple[Any, Path], tmp_path: Path) -> None:
    """Under another name, with other adapters, in a model without the head or in 4 bits; the file is an
    ordinary safetensors file."""
    model, folder = trained
    adapters.set_active(model, "task")
    inputs = FAMILIES["bert"].inputs()
    fresh = FAMILIES["bert"].make()
    adapters.add(fresh, "task", "pfeiffer")
    assert adapters.load(fresh, folder, load_as="again") == "again"
    assert adapters.active(fresh) == [] and set(adapters.names(fresh)) == {"task", "again"}
    adapters.set_active(fresh, "again")
    assert torch.equal(output(fresh, inputs), output(model, inputs))
    headless, packed = copy.deepcopy(FAMILIES["bert"].make().bert), FAMILIES["bert"].make("nf4")
    for other in (headless, packed):
        assert adapters.load(other, folder) == "task"
        adapters.save(other, "task", tmp_path / "twice")
        for name in (CONFIG, WEIGHTS):
            assert (tmp_path / "twice" / name).read_bytes() == (folder / name).read_bytes()
    tensors = safetensors.load_file(folder / WEIGHTS)
    assert tensors["encoder.layer.1.output.dense.up"].shape == (64, 4)
    assert json.loads((folder / CONFIG).read_text())["config"]["scaling"] == 0.5
    adapters.train(packed, "task")
    assert all(p.requires_grad for n, p in packed.named_parameters() if "_adapters" in n)


def test_16_bit_parameters(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model = FAMILIES["bert"].make()
    adapters.load(model, trained[1])
    for site in adapters.manage.sites(model):
        site.bfloat16()
    adapters.save(model, "task", tmp_path)
    adapters.load(model, tmp_path, "narrow")
    dtypes = {p.dtype for site in adapters.manage.sites(model) for p in site.adapters["narrow"].parameters()}
    assert dtypes == {torch.bfloat16}


def edit(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / CONFIG, **changes)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / CONFIG, lambda about: about["config"].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / WEIGHTS, change)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])


KEY = "encoder.layer.0.output.dense.up"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-config": (lambda f: (f / CONFIG).unlink(), f"expected {CONFIG}, got none"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), f"expected {WEIGHTS}, got none"),
    "no-json": (lambda f: (f / CONFIG).write_bytes(b"\xff{"), "expected a JSON object, got something else"),
    "of-peft": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'),
        "expected format 'peft_kernels bottleneck adapter', got null",
    ),
    "version": (edit(version=2), "expected version 1, got 2"),
    "name": (edit(name=3), "expected a name, got 3"),
    "field": (edit_config(rank=3), "expected a config of activation, .*, got"),
    "type": (edit_config(reduction="16"), "reduction: expected a float, got '16'"),
    "huge": (edit_config(reduction=0.001), r"shape \(64000, 64\), got torch.float32 of \(4, 64\)"),
    "tiny": (edit_config(reduction=5e-324), "reduction: .* 0.001 at least, got 5e-324"),
    "nan": (edit_config(scaling=float("nan")), "scaling: expected a finite number, got nan"),
    "no-float": (edit_config(scaling=10**400), "scaling: expected a finite number, got 1000"),
    "truncated": (truncate, f"{WEIGHTS}: is truncated in"),
    "missing": (tensors(lambda t: t.pop(KEY)), f"expected {KEY}, as this model has it"),
    "foreign": (
        tensors(lambda t: t.update(x=torch.ones(1))),
        "x: expected parameters of this model's adapter",
    ),
    "shape": (
        tensors(lambda t: t.update({KEY: torch.ones(64, 5)})),
        r"output.dense.up: expected a floating dtype of shape \(64, 4\), got torch.float32 of \(64, 5\)",
    ),
    "integers": (
        tensors(lambda t: t.update({KEY: torch.ones(64, 4, dtype=torch.int32)})),
        "expected a floating dtype .* got torch.int32",
    ),
    "values": (tensors(lambda t: t[KEY].fill_(float("nan"))), "expected finite numbers, got NaN or Inf"),
    "other-model": (edit_config(attention=False), "attention.output.dense.* this model's adapter only"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(
    trained: tuple[Any, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, nothing changes, and shapes are checked before anything is allocated."""
    damage, message = DAMAGES[name]
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).write_bytes((trained[1] / file).read_bytes())
    damage(tmp_path)
    model = FAMILIES["bert"].make()
    adapters.add(model, "mine", "pfeiffer")
    before = [name for name, _ in model.named_modules()]
    if name == "huge":
        monkeypatch.setattr(AdapterSite, "device", property(lambda site: pytest.fail("parameters are made")))
    with pytest.raises(CheckpointError, match=message):
        adapters.load(model, tmp_path, "new")
    assert adapters.names(model) == ["mine"] and [name for name, _ in model.named_modules()] == before


def test_existing_name_and_other_family(trained: tuple[Any, Path]) -> None:
    model, folder = trained
    with pytest.raises(ValueError, match="name: there is an adapter 'task' already"):
        adapters.load(model, folder)
    llama = FAMILIES["llama"].make()
    with pytest.raises(CheckpointError, match=r"expected layers\.0\.self_attn\.o_proj\.\w+, as this model"):
        adapters.load(llama, folder)
    assert adapters.names(llama) == []


def test_encoder_and_decoder_with_separate_adapters(tmp_path: Path) -> None:
    """A T5's encoder and decoder have sites of equal names: neither may overwrite the other."""
    model = FAMILIES["t5"].make()
    adapters.add(model.encoder, "task", "houlsby")
    adapters.save(model, "task", tmp_path / "encoder")  # named as in the module that it was added to
    adapters.load(FAMILIES["t5"].make().encoder, tmp_path / "encoder")
    adapters.add(model.decoder, "task", "pfeiffer")
    with pytest.raises(ValueError, match=r"name: expected an adapter of one model, .*: encoder, decoder"):
        adapters.save(model, "task", tmp_path / "both")
    for part, config in ((model.encoder, "houlsby"), (model.decoder, "pfeiffer")):
        adapters.save(part, "task", tmp_path / config)
        assert json.loads((tmp_path / config / CONFIG).read_text())["config"] == asdict(config_of(config))
    adapters.delete(model, "task")
    adapters.add(model, "task")
    with pytest.raises(ValueError, match="expected what adapter 'task' was added to, got a submodule"):
        adapters.save(model.encoder, "task", tmp_path / "both")
    adapters.delete(model.decoder, "task")
    with pytest.raises(ValueError, match=r"expected adapter 'task' in 8 places, .*, got it in 4"):
        adapters.save(model, "task", tmp_path / "both")
    assert not (tmp_path / "both").exists()
