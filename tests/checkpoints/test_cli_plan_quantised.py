"""`peft-kernels plan` of folders that are already quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_damage import change_json
from plan_measures import SIZES

from peft_kernels.cli.main import main
from peft_kernels.nf4.packed_format import METHOD

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OTHERS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def config(folder: Path, quantization: Any) -> Path:
    transformers.LlamaConfig(**SIZES).save_pretrained(folder)
    change_json(folder / "config.json", quantization_config=quantization)
    return folder / "config.json"


@pytest.mark.parametrize("method", OTHERS)
def test_no_qlora_where_quantize_refuses(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, OTHERS[method])
    assert main(["plan", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "qlora" not in report["methods"] and "lora" in report["methods"]
    assert any(f"the model is quantised ({method}): these are" in note for note in report["notes"])
    assert main(["plan", str(tmp_path), "--method", "qlora"]) == 1
    assert (
        f"expected a dense model for qlora, got one that is quantised ({method})" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "quantization", [NF4 | {"quant_method": "bitsandbytes"}, {"quant_method": METHOD}, {}]
)
def test_qlora_of_nf4_or_dense_folders(
    quantization: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config(tmp_path, quantization)), "--method", "qlora", "--json"]) == 0
    assert "total" in json.loads(capsys.readouterr().out)["methods"]["qlora"]
