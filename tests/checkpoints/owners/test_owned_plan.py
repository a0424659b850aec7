"""`peft-kernels plan` of checkpoints in other owners' formats, from their headers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from all_folders import FOLDERS, packed
from checkpoint_damage import change_json, change_tensors
from moe_models import qwen_moe
from owned_folders import FILE, NVFP4, gpt_oss, nvfp4, nvfp4_config
from packed_models import KINDS, config_of, gptq
from plan_measures import nbytes, planned
from test_owned_refused import BROKEN, MXFP4, VARIANTS
from transformers_models import read, read_config

from peft_kernels.checkpoints.header import Entry
from peft_kernels.cli.main import main
from peft_kernels.nf4.owners import OWNERS

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("kind", [*FOLDERS, "gptq last"])
def test_weights(kind: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, and nothing is read but headers and single numbers."""
    made = FOLDERS.get(kind) or packed(kind)
    made.write(tmp_path)
    title = OWNERS[made.owner].title
    model, original = read(tmp_path, dtype="auto"), Entry.read

    def one_number(self: Entry) -> torch.Tensor:
        assert self.nbytes <= 8
        return original(self)

    monkeypatch.setattr(Entry, "read", one_number)
    for options in ([], ["--dtype", "float32"]):
        methods = planned(capsys, tmp_path, *options)["methods"]
        wide = model.to(torch.float32) if options else model
        if "symmetric" in kind:  # loading finds that zero points are all 8, and needs none
            assert nbytes(wide) < methods["qlora"]["weights"] < 1.04 * nbytes(wide)
        else:
            assert methods["qlora"]["weights"] == nbytes(wide)
        assert methods["qlora"]["weights"] < 0.7 * methods["lora"]["weights"]
        assert methods["qlora"]["adapters"] == methods["lora"]["adapters"]
    report = planned(capsys, tmp_path / "config.json")
    note = f"the model is packed ({title}): qlora is for its weights as they are, other methods for the "
    assert f"{note}dequantised model" in report["notes"]
    # Without files: a module that the configuration names counts as packed.
    assert 0.9 < report["methods"]["qlora"]["weights"] / nbytes(read(tmp_path, dtype="auto")) < 1.1


def test_groups_of_a_configuration_alone(tmp_path: Path, capsys: Captured) -> None:
    """Of 128, and not the shortest that the format has."""
    with pytest.MonkeyPatch.context() as patch:
        pack, config = (lambda *size: gptq(*size, 128)), config_of("gptq", group_size=128)
        patch.setitem(KINDS, "gptq", dataclasses.replace(KINDS["gptq"], pack=pack, config=config))
        FOLDERS["gptq"].write(tmp_path, hidden_size=128, intermediate_size=256)
    weights = planned(capsys, tmp_path / "config.json")["methods"]["qlora"]["weights"]
    assert 0.98 < weights / nbytes(read(tmp_path, dtype="auto")) <= 1


@pytest.mark.parametrize("owner", NVFP4)
def test_table(owner: str, tmp_path: Path, capsys: Captured) -> None:
    """All of it, as for a folder in NF4."""
    nvfp4(tmp_path, owner)
    assert main(["plan", str(tmp_path), "--memory", "2GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["lora", "qlora", "dora", "adapter", "prefix", "full"] for line in lines)
    for label in ("weights", "activations", "most at any time", "fits into 2 GB"):
        assert any(line.startswith(label) and "?" not in line for line in lines), label


# What loading refuses, in the same sentence


def refused_alike(folder: Path, capsys: Captured) -> str:
    """Both with one sentence, which is returned."""
    with pytest.raises(ValueError) as caught:
        read(folder)
    capsys.readouterr()
    assert main(["plan", str(folder)]) == 1
    assert capsys.readouterr().err.strip() == f"peft-kernels: {caught.value}"
    return str(caught.value)


UNSEEN = ("NaN scale", "NaN", "-1")
"""Faults of values, which headers do not show."""


@pytest.mark.parametrize("what", sorted(MXFP4.keys() - set(UNSEEN)))
def test_damaged_mxfp4(what: str, tmp_path: Path, capsys: Captured) -> None:
    gpt_oss(tmp_path)
    change_tensors(tmp_path / FILE, MXFP4[what][0])
    refused_alike(tmp_path, capsys)


@pytest.mark.parametrize("what", sorted(BROKEN.keys() - set(UNSEEN)))
def test_damaged_nvfp4(what: str, tmp_path: Path, capsys: Captured) -> None:
    nvfp4(tmp_path, "compressed-tensors")
    change_tensors(tmp_path / FILE, BROKEN[what][0])
    refused_alike(tmp_path, capsys)


MODELOPT = "nvfp4 of modelopt"
PARTS = [
    (kind, part) for kind in (MODELOPT, "gptq", "awq", "fp8") for part in OWNERS[FOLDERS[kind].owner].parts
]


@pytest.mark.parametrize(
    ("kind", "part", "everywhere"), [*((*one, False) for one in PARTS), (MODELOPT, "weight_scale_2", True)]
)
def test_missing_part(kind: str, part: str, everywhere: bool, tmp_path: Path, capsys: Captured) -> None:
    """Of one layer or of all, so that nothing may mark them as packed."""
    FOLDERS[kind].write(tmp_path, num_hidden_layers=1)
    name = f"model.layers.0.{'mlp.down_proj' if everywhere else 'self_attn.q_proj'}.{part}"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for each in list(tensors):
            if each == name or (everywhere and each.endswith(f"_proj.{part}")):
                del tensors[each]

    change_tensors(tmp_path / FILE, drop)
    assert refused_alike(tmp_path, capsys) == f"{name}: expected this tensor of a packed weight, got none"


def test_packed_embeddings(tmp_path: Path, capsys: Captured) -> None:
    nvfp4(tmp_path, "compressed-tensors")
    name = "model.embed_tokens.weight"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        codes, scales = torch.zeros(128, 32, dtype=torch.uint8), torch.ones(128, 4).to(torch.float8_e4m3fn)
        tensors |= {f"{name}_packed": codes, f"{name}_scale": scales, f"{name}_global_scale": torch.ones(1)}

    change_tensors(tmp_path / FILE, pack)
    assert "expected a dense weight for an Embedding" in refused_alike(tmp_path, capsys)


def test_one_packed_layer_of_experts(tmp_path: Path, capsys: Captured) -> None:
    qwen_moe().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", quantization_config=nvfp4_config("compressed-tensors"))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        tensors[f"{name}_packed"] = torch.zeros(64, 32, dtype=torch.uint8)

    change_tensors(tmp_path / FILE, pack)
    missing = "model.layers.0.mlp.experts.0.gate_proj.weight_packed"
    expected = f"{missing}: expected this tensor of a packed weight, got none"
    assert refused_alike(tmp_path, capsys) == expected


@pytest.mark.parametrize("what", VARIANTS)
def test_unknown_variants(what: str, tmp_path: Path, capsys: Captured) -> None:
    """Figures of the dense model, and why it is not loaded packed."""
    owner, changed, _ = VARIANTS[what]
    nvfp4(tmp_path, owner)
    change_json(tmp_path / "config.json", quantization_config=nvfp4_config(owner) | changed)
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    report = planned(capsys, tmp_path)
    assert "qlora" not in report["methods"] and "lora" in report["methods"]
    assert f"loading refuses it ({caught.value}): these are the figures of the dense" in report["notes"][-1]
    assert main(["plan", str(tmp_path), "--method", "qlora"]) == 1
    assert str(caught.value) in capsys.readouterr().err
