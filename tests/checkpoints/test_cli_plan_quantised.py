"""`peft-kernels plan` of folders that are already quantised, and of other formats than NF4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_models as moe
import pytest
import torch
from checkpoint_damage import change_json
from plan_measures import SIZES, nbytes, planned
from transformers_models import Auto, loaded, read, read_config, transformers

import peft_kernels as pk
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.cli.main import main
from peft_kernels.core.formats import FORMATS
from peft_kernels.nf4.packed_format import METHOD

Captured = pytest.CaptureFixture[str]
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OTHERS: dict[str, dict[str, Any]] = {
    "eetq": {"quant_method": "eetq"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "sparse-24"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def config(folder: Path, quantization: Any) -> Path:
    transformers.LlamaConfig(**SIZES).save_pretrained(folder)
    change_json(folder / "config.json", quantization_config=quantization)
    return folder / "config.json"


@pytest.mark.parametrize("method", OTHERS)
def test_refused_by_loading(method: str, tmp_path: Path, capsys: Captured) -> None:
    """No QLoRA, and the sentence with which loading refuses the folder."""
    path = config(tmp_path, OTHERS[method])
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    report = planned(capsys, path)
    assert "qlora" not in report["methods"] and "lora" in report["methods"]
    expected = f"the model is quantised ({method}), and loading refuses it ({caught.value}): these are the "
    assert report["notes"][-1] == f"{expected}figures of the dense model, without QLoRA"
    assert main(["plan", str(tmp_path), "--method", "qlora"]) == 1
    assert f"one that is quantised ({method}); {caught.value}" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", [BNB, {"quant_method": METHOD}, {}])
def test_qlora_of_packed_or_dense_folders(quantization: Any, tmp_path: Path, capsys: Captured) -> None:
    report = planned(capsys, config(tmp_path, quantization), "--method", "qlora")
    assert "total" in report["methods"]["qlora"]
    assert any("the model is packed (NF4)" in note for note in report["notes"]) == bool(quantization)


# Folders

FORMS = [
    (format, double_quant)
    for format, form in FORMATS.items()
    for double_quant in ((True, False) if form.takes_double_quant else (None,))
]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """With rows of whole blocks in every format."""
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(("format", "double_quant"), FORMS)
def test_weights_of_folders(
    format: str, double_quant: bool | None, dense: Path, tmp_path: Path, capsys: Captured
) -> None:
    """To the byte, from the headers and from the configuration."""
    for skip in ([], ["layers.1.mlp.up_proj"]):
        folder = tmp_path / str(len(skip))
        quantize_checkpoint(dense, folder, None, double_quant, ["lm_head", *skip], format=format)
        report, expected = planned(capsys, folder), nbytes(read(folder, dtype="auto"))
        assert set(report["methods"]) == {"lora", "qlora", "dora", "adapter", "prefix", "full"}
        assert report["methods"]["qlora"]["weights"] == expected
        assert report["methods"]["lora"]["weights"] == nbytes(Auto.from_pretrained(dense, dtype="auto"))
        alone = planned(capsys, folder / "config.json")
        assert (alone["methods"]["qlora"]["weights"] == expected) == (not skip)
        assert any(note.startswith(f"the model is packed ({format.upper()})") for note in report["notes"])
        assert any("packed sizes are the format's usual ones" in note for note in alone["notes"])


@pytest.mark.parametrize("format", FORMATS)
def test_format_of_qlora(format: str, dense: Path, capsys: Captured) -> None:
    report = planned(capsys, dense, "--format", format)
    model = pk.quantize_model(Auto.from_pretrained(dense, dtype="auto"), format=format)
    assert report["methods"]["qlora"]["weights"] == nbytes(model)
    assert "total" in report["methods"]["qlora"]


@pytest.mark.parametrize("format", FORMATS)
def test_folders_with_packed_experts(format: str, tmp_path: Path, capsys: Captured) -> None:
    moe.model("qwen3_moe", torch.bfloat16).save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"format": format, "skip": ["layers.0.mlp.experts"]}
    options["blocksize"] = 32 if FORMATS[format].scale == "half" else None
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", experts=True, **options)
    report = planned(capsys, tmp_path / "packed", "--method", "lora,qlora")
    assert report["methods"]["qlora"]["weights"] == nbytes(read(tmp_path / "packed", dtype="auto"))
    quantize_checkpoint(tmp_path / "dense", tmp_path / "linear", **options | {"skip": ["lm_head"]})
    assert main(["plan", str(tmp_path / "linear"), "--experts"]) == 1
    assert "experts: expected a model with experts that can be packed, got none" in capsys.readouterr().err


def test_headers_count_and_not_the_configuration(dense: Path, tmp_path: Path, capsys: Captured) -> None:
    quantize_checkpoint(dense, tmp_path / "packed", 32, double_quant=False)
    path = tmp_path / "packed" / "config.json"
    change_json(path, lambda config: config["quantization_config"].pop("bnb_4bit_blocksize"))
    found = [planned(capsys, each)["methods"]["qlora"]["weights"] for each in (tmp_path / "packed", path)]
    assert found[0] == nbytes(read(tmp_path / "packed", dtype="auto")) > found[1]


def test_format_of_a_packed_folder_is_its_own(dense: Path, tmp_path: Path, capsys: Captured) -> None:
    loaded(dense).save_pretrained(tmp_path / "packed")
    assert main(["plan", str(tmp_path / "packed"), "--format", "fp8"]) == 1
    assert "format: expected none for a model that is packed (NF4), got fp8" in capsys.readouterr().err


def test_rows_that_a_format_cannot_have(tmp_path: Path, capsys: Captured) -> None:
    path = config(tmp_path, {})
    change_json(path, intermediate_size=72)
    assert main(["plan", str(path), "--format", "mxfp4"]) == 1
    expected = "model.layers.0.mlp.down_proj: expected a multiple of 32 input features for mxfp4, got 72"
    assert expected in capsys.readouterr().err


def test_a_damaged_folder(dense: Path, tmp_path: Path, capsys: Captured) -> None:
    quantize_checkpoint(dense, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert main(["plan", str(tmp_path / "packed")]) == 1
    assert "is truncated in" in capsys.readouterr().err
