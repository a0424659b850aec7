"""Checkpoints with packed experts: what the command line reports, and faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moe_models as moe
import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from moe_checkpoints import items_of, loaded, saved
from transformers_models import assert_same_state, read

import peft_kernels as pk
from peft_kernels.cli.main import main


def test_inspect_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loaded(saved(tmp_path / "dense", "qwen3_moe"))
    model.save_pretrained(tmp_path / "4bit")
    assert main(["inspect", str(tmp_path / "4bit"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == []
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    experts = tensors["model.layers.0-1.mlp.experts.down_proj"]
    assert experts["shape"] == [4, 64, 64] and experts["form"].startswith("NF4 of float32, blocks of 64")
    layers = [
        (layer["layer"], layer["experts"], layer["weights"], layer["faults"]) for layer in found["experts"]
    ]
    assert layers == [("model.layers.0", 4, 2, 0), ("model.layers.1", 4, 2, 0)]
    of_experts = sum(t.nbytes for name, t in items_of(tmp_path / "4bit").items() if ".experts." in name)
    assert sum(layer["bytes"] for layer in found["experts"]) == of_experts
    other = loaded(tmp_path / "dense", nf4={"blocksize": 32})
    pk.load_checkpoint(other, tmp_path / "4bit")
    assert_same_state(other, model)
    damage = {"model.layers.1.mlp.experts.down_proj.absmax": torch.ones(3, dtype=torch.uint8)}
    change_tensors(tmp_path / "4bit" / "model.safetensors", lambda items: items.update(damage))
    assert main(["inspect", str(tmp_path / "4bit"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (fault,) = report["faults"]
    assert fault.startswith("model.layers.1.mlp.experts.down_proj.absmax: expected number of dimensions 2")
    assert [layer["faults"] for layer in report["experts"]] == [0, 1]


def test_equal_layers_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the names in the file, which in Granite differ from the modules'."""
    loaded(saved(tmp_path / "dense", "granitemoe")).save_pretrained(tmp_path / "4bit")
    assert main(["inspect", str(tmp_path / "4bit")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "model.layers.0-1 " in line]
    assert rows == [["model.layers.0-1", "4", "2", "25.6", "kB", "0"]]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "expected quant_method peft_kernels_nf4 for",
        ),
        (None, "expected a quantization_config of peft_kernels"),
    ],
)
def test_configuration_without_packed_experts(
    config: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded(saved(tmp_path / "dense", "olmoe")).save_pretrained(tmp_path / "4bit")
    change_json(tmp_path / "4bit" / "config.json", quantization_config=config)
    assert main(["inspect", str(tmp_path / "4bit"), "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert sentence in fault


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight(bad: float, tmp_path: Path) -> None:
    model = moe.model("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = bad
    model.save_pretrained(tmp_path)
    name = r"model\.layers\.1\.mlp\.experts\.down_proj\[2\]"
    with pytest.raises(ValueError, match=f"{name}: expected finite values, got 1 NaN or Inf"):
        loaded(tmp_path)


def test_experts_of_different_shapes(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    key = next(k for k in items_of(tmp_path) if k.endswith("layers.1.block_sparse_moe.experts.2.w2.weight"))
    change_tensors(
        tmp_path / "model.safetensors", lambda items: items.update({key: items[key][:, :-2].contiguous()})
    )
    name = r"model\.layers\.1\.mlp\.experts\.down_proj\[2\]"
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(64, 128\), got \(64, 126\)"):
        loaded(tmp_path)


def test_weight_of_another_shape(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_oss")
    change_json(tmp_path / "config.json", num_local_experts=3)
    with pytest.raises((ValueError, RuntimeError), match=r"expected shape|mismatched"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda items, key: items.pop(f"{key}.absmax"), "absmax: expected a dense tensor"),
        (lambda items, key: items.update({key: items[key][:-1]}), "expected number of experts 4, got 3"),
        (
            lambda items, key: items.update({f"{key}.nested_absmax": -items[f"{key}.nested_absmax"]}),
            "nested_absmax: expected finite scales of 0 or more",
        ),
    ],
)
def test_broken_checkpoint(change: Any, sentence: str, tmp_path: Path) -> None:
    loaded(saved(tmp_path / "dense", "qwen3_moe")).save_pretrained(tmp_path)
    key = "model.layers.1.mlp.experts.down_proj"
    change_tensors(tmp_path / "model.safetensors", lambda items: change(items, key))
    with pytest.raises(ValueError, match=key.replace(".", r"\.") + ".*" + sentence):
        read(tmp_path)
