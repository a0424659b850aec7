"""Adapters that AdapterHub's library wrote (tools/adapterhub_samples.py) compute here what they do there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.header import CheckpointError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

SAMPLES = Path(__file__).parent / "adapterhub"
_TOOL = SAMPLES.parent.parent / "tools" / "adapterhub_samples.py"
_spec: Any = importlib.util.spec_from_file_location("adapterhub_samples", _TOOL)
samples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)


def make(case: str, head: str = "Model") -> Any:
    family = samples.CASES[case][0]
    model = getattr(transformers, family + head)(getattr(transformers, family + "Config")(**samples.SIZES))
    samples.filled(model if head == "Model" else model.base_model)
    return model.eval()


@pytest.mark.parametrize("case", samples.CASES)
def test_computes_the_same(case: str) -> None:
    model = make(case)
    with torch.no_grad():
        bare = model(samples.inputs())[0]
        assert pk.adapters.load(model, SAMPLES / case) == "sample"
        assert torch.equal(model(samples.inputs())[0], bare)
        pk.adapters.set_active(model, "sample")
        got = model(samples.inputs())[0]
    want = safetensors.load_file(SAMPLES / case / "expected.safetensors")["output"]
    assert testing.relative_error(got, want) < 1e-5 < 1e-2 < testing.relative_error(bare, want)


def test_by_row_trained_and_saved_as_ours(tmp_path: Path) -> None:
    """The norm is read behind every way in: rows, gradients, files, a head around the model."""
    case = "bert-seq_bn"
    model, ids = make(case, "ForSequenceClassification"), samples.inputs()
    pk.adapters.load(model, SAMPLES / case, load_as="mine")
    pk.adapters.add(model, "other", "houlsby")
    want = safetensors.load_file(SAMPLES / case / "expected.safetensors")["output"]
    with torch.no_grad(), pk.adapters.rows(model, ["mine", None]):
        mixed = model.base_model(ids)[0]
    with torch.no_grad():
        bare = model.base_model(ids)[0]
    assert testing.relative_error(mixed[0], want[0]) < 1e-5 and torch.equal(mixed[1], bare[1])
    pk.adapters.train(model, ["mine", "other"])
    model(ids)[0].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".mine." in name}
    assert grads and all(grad is not None and bool(grad.any()) for grad in grads.values())
    pk.adapters.save(model, "mine", tmp_path)
    fresh = make(case)
    pk.adapters.load(fresh, tmp_path)
    pk.adapters.set_active(fresh, "mine")
    with torch.no_grad():
        assert testing.relative_error(fresh(ids)[0], want) < 1e-5


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / "adapter_config.json").read_text())
        about["config"].update(changes)
        (folder / "adapter_config.json").write_text(json.dumps(about))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = safetensors.load_file(folder / "adapter.safetensors")
        change(found)
        safetensors.save_file(found, folder / "adapter.safetensors")

    return damage


class Evil:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code of a file was run",)


def evil(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_adapter.bin")


KEY = "encoder.layer.0.output.adapters.sample.adapter_up.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ln_after": (edit(ln_after=True), "ln_after: expected false, for no other is computed here, got true"),
    "residual": (edit(residual_before_ln="post_add"), "residual_before_ln: expected true, .* got post_add"),
    "scaling": (edit(scaling="learned"), "scaling: expected one number, got learned"),
    "by-layer": (edit(reduction_factor={"default": 8}), "reduction_factor: expected one number, got"),
    "invertible": (edit(inv_adapter="nice"), "inv_adapter: expected null, .* got nice"),
    "compacter": (edit(phm_layer=True), "phm_layer: expected false"),
    "activation": (edit(non_linearity="tanh"), "activation: expected one of"),
    "other-kind": (edit(architecture="lora"), "expected fields of AdapterHub's BnConfig, got"),
    "of-peft": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "adapter_config.json: expected one of AdapterHub's",
    ),
    "code": (evil, r"pytorch_adapter.bin: expected tensors that torch.load\(weights"),
    "none": (
        lambda f: (f / "adapter.safetensors").unlink(),
        "expected adapter.safetensors or pytorch",
    ),
    "foreign": (
        tensors(lambda t: t.update(x=torch.ones(1))),
        "parameters of adapter .*sample.* only",
    ),
    "missing": (tensors(lambda t: t.pop(KEY)), r"expected encoder.layer.0.output.dense.up, as this model"),
    "shape": (tensors(lambda t: t.update({KEY: torch.ones(32, 3)})), r"shape \(32, 4\), got .* of \(32, 3\)"),
    "nan": (tensors(lambda t: t[KEY].fill_(float("nan"))), "expected finite numbers, got NaN or Inf"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    for file in (SAMPLES / "bert-seq_bn").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    model = make("bert-seq_bn")
    with pytest.raises(CheckpointError, match=message):
        pk.adapters.load(model, tmp_path)
    assert pk.adapters.names(model) == []


def test_norms_that_are_elsewhere_are_refused() -> None:
    sizes = samples.SIZES | {"num_key_value_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with pytest.raises(ValueError, match=r"layers\.0: expected one layer norm beside mlp.down_proj"):
        pk.adapters.add(llama, "one", pk.adapters.AdapterConfig.pfeiffer(after_norm=True))
