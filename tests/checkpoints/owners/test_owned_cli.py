"""`peft-kernels` on checkpoints in other owners' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from owned_folders import FILE, NVFP4, gpt_oss, nvfp4, nvfp4_config
from packed_models import make

from peft_kernels.cli.main import main

Captured = pytest.CaptureFixture[str]
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


def inspected(folder: Path, capsys: Captured, code: int = 0) -> tuple[dict[str, Any], Any]:
    """Tensors by name, and the report."""
    assert main(["inspect", str(folder), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    return {tensor["name"]: tensor for tensor in report["tensors"]}, report


def test_inspect_gpt_oss(tmp_path: Path, capsys: Captured) -> None:
    tensors = gpt_oss(tmp_path)
    found, report = inspected(tmp_path, capsys)
    assert report["faults"] == [] and report["architecture"] == "GptOssForCausalLM"
    name = "model.layers.0-1.mlp.experts.gate_up_proj"
    nbytes = 2 * 4 * 192 * 64 * 17 // 32
    assert found[name] == {
        "name": name, "count": 2, "shape": [4, 192, 64], "form": "MXFP4, blocks of 32", "bytes": nbytes,
    }  # fmt: skip
    assert not any(part in name for name in found for part in ("_blocks", "_scales"))
    layers = {layer["layer"]: layer for layer in report["experts"]}
    assert layers["model.layers.1"]["experts"] == 4 and layers["model.layers.1"]["weights"] == 2
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("owner", NVFP4)
def test_inspect_nvfp4(owner: str, tmp_path: Path, capsys: Captured) -> None:
    tensors = nvfp4(tmp_path, owner, activations=True)
    found, report = inspected(tmp_path, capsys)
    assert report["faults"] == [] and report["architecture"] == "LlamaForCausalLM"
    down = found["model.layers.0-1.mlp.down_proj.weight"]
    assert (down["shape"], down["form"]) == ([64, 128], f"NVFP4 of {owner}, blocks of 16")
    assert down["bytes"] == 2 * (64 * 128 // 2 + 64 * 128 // 16 + 4 + 4), "with the scale of inputs"
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors.values())


FORMS = {
    "gptq": "GPTQ, blocks of 32",
    "gptq v2": "GPTQ v2, blocks of 32",
    "gptq int8": "GPTQ in 8 bits, blocks of 128",
    "awq": "AWQ, blocks of 32",
    "packed zeros": "INT4 of compressed-tensors, blocks of 32",
    "fp8": "FP8, blocks of 128 x 128",
    "fp8 rows": "FP8 of compressed-tensors, a scale for each row",
    "fp8 modelopt": "FP8 of modelopt, a scale for each row",
}


@pytest.mark.parametrize("kind", FORMS)
def test_inspect_int4_and_fp8(kind: str, tmp_path: Path, capsys: Captured) -> None:
    made = make(tmp_path, kind)
    found, report = inspected(tmp_path, capsys)
    assert report["faults"] == [] and report["architecture"] == "LlamaForCausalLM"
    down = found["model.layers.0-1.mlp.down_proj.weight"]
    name = "model.layers.0.mlp.down_proj."
    assert (down["shape"], down["form"]) == ([*made.dense[f"{name}weight"].shape], FORMS[kind])
    assert down["bytes"] == 2 * sum(t.nbytes for n, t in made.tensors.items() if n.startswith(name))
    assert not any(n.endswith(("qweight", "scales", "g_idx", "_packed", "_shape", "_scale")) for n in found)
    assert report["bytes"] == sum(tensor.nbytes for tensor in made.tensors.values())


@pytest.mark.parametrize("kind", ["gptq", "fp8"])
def test_inspect_finds_faults_of_int4_and_fp8(kind: str, tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path, kind, num_hidden_layers=1)
    up = "model.layers.0.mlp.up_proj"
    if kind == "gptq":
        change_tensors(tmp_path / FILE, lambda t: t.update({f"{up}.g_idx": t[f"{up}.g_idx"].flip(0)}))
        expected = f"{up}.g_idx: expected groups of consecutive input features, got another order"
    else:
        change_tensors(tmp_path / FILE, lambda t: t[f"{up}.weight"].view(torch.uint8)[0].fill_(127))
        expected = f"{up}.weight: expected codes of finite values, got 192 NaN among"
    found, report = inspected(tmp_path, capsys, code=1)
    assert len(report["faults"]) == 1 and report["faults"][0].startswith(expected)
    assert found[f"{up}.weight"]["form"] == FORMS[kind].partition(",")[0] + ", faulty"


def test_inspect_finds_faults(tmp_path: Path, capsys: Captured) -> None:
    gpt_oss(tmp_path)
    change_tensors(tmp_path / FILE, lambda tensors: tensors[SCALES].view(-1)[0].fill_(255))
    found, report = inspected(tmp_path, capsys, code=1)
    expected = f"{SCALES}: expected finite scales of 0 or more, got 1 NaN, Inf or negative among 768"
    assert report["faults"] == [expected]
    assert found["model.layers.1.mlp.experts.down_proj"]["form"] == "MXFP4, faulty"
    assert [layer["faults"] for layer in report["experts"]] == [0, 1]


def test_inspect_finds_missing_and_other_tensors(tmp_path: Path, capsys: Captured) -> None:
    gpt_oss(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for what in ("blocks", "scales"):
            del tensors[f"model.layers.0.mlp.experts.gate_up_proj_{what}"]
            name = f"model.layers.1.mlp.experts.down_proj_{what}"
            tensors[name] = tensors[name][:3].contiguous()
        tensors["lm_head.weight"][0, 0] = torch.nan

    change_tensors(tmp_path / FILE, change)
    theirs = "as GptOssForCausalLM has it"
    assert inspected(tmp_path, capsys, code=1)[1]["faults"] == [
        "lm_head.weight: 1 of 8192 values are NaN or Inf",
        f"model.layers.1.mlp.experts.down_proj: expected shape (4, 96, 64), {theirs}, got (3, 64, 96)",
        f"model.layers.0.mlp.experts.gate_up_proj: expected this tensor, {theirs}, got none",
    ]


def test_inspect_finds_integers(tmp_path: Path, capsys: Captured) -> None:
    """In a dense layer among packed experts, which loading takes for a packed one."""
    gpt_oss(tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight"
    change_tensors(tmp_path / FILE, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    expected = f"{name}: expected a floating dtype, as GptOssForCausalLM has it, got torch.int8"
    assert inspected(tmp_path, capsys, code=1)[1]["faults"] == [expected]


def test_inspect_of_a_dense_folder_that_says_packed(tmp_path: Path, capsys: Captured) -> None:
    gpt_oss(tmp_path)
    change_json(tmp_path / "config.json", quantization_config=nvfp4_config("modelopt"))
    _, report = inspected(tmp_path, capsys, code=1)
    expected = "config.json: expected weights in NVFP4 of modelopt, as its quantization_config says, got none"
    assert expected in report["faults"]


def test_quantize_is_refused(tmp_path: Path, capsys: Captured) -> None:
    gpt_oss(tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "new")]) == 1
    assert "expected a dense model, got one that is packed already (MXFP4)" in capsys.readouterr().err
