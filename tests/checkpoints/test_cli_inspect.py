"""`peft-kernels inspect` lists a checkpoint's contents, and each fault in a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import INDEX, change_json, write, write_checkpoint

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.cli.inspect import _ranges, grouped
from peft_kernels.cli.main import main
from peft_kernels.cli.output import Output, size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    code = main(["inspect", str(path), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_valid_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = inspected(folder, capsys)
    assert code == 0 and report["faults"] == []
    assert report["files"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert tensors["up.weight"]["shape"] == [40, 48]
    assert tensors["up.weight"]["form"] == "NF4 of float32, blocks of 32, double-quantised"
    assert tensors["down.weight"]["form"] == "NF4 of float32, blocks of 32, fp32 scales"
    assert tensors["norm.bias"] == {
        "name": "norm.bias", "count": 1, "shape": [48], "form": "float32", "bytes": 192,
    }  # fmt: skip
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(report["bytes_by_form"].values()) == report["bytes"] < total
    assert report["bytes"] == sum(entry.nbytes for entry in Checkpoint.open(folder).entries.values())


def test_layers_are_grouped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    layers = {f"layers.{i}.experts.{j}.up.weight": torch.zeros(4, 8) for i in (0, 1, 2, 11) for j in (0, 1)}
    write(
        path,
        layers | {"layers.1.norm": torch.zeros(8), "layers.2.norm": torch.zeros(9), "head": torch.zeros(3)},
    )
    found = {
        group.name: (len(group.numbers), group.shape, group.nbytes)
        for group in grouped(Checkpoint.open(path))
    }
    assert found == {
        "head": (1, (3,), 12),
        "layers.0-2,11.experts.0-1.up.weight": (8, (4, 8), 1024),
        "layers.1.norm": (1, (8,), 32),
        "layers.2.norm": (1, (9,), 36),
    }
    assert _ranges({3, 5, 4, 9, 0}) == "0,3-5,9"


def test_any_printable_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["layers.#.1.up", "#", "layers.0.\\1.up"]
    write(tmp_path / "model.safetensors", {name: torch.ones(1) for name in names})
    code, report = inspected(tmp_path, capsys)
    assert code == 0 and {tensor["name"] for tensor in report["tensors"]} == set(names)


def test_every_fault_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    state = dict(Checkpoint.open(path))
    state["up.weight.nested_absmax"][0] = float("nan")
    state["norm.bias"][:2] = float("inf")
    write(path, state)
    change_json(folder / INDEX, lambda index: index["weight_map"].update(ghost=path.name))
    (folder / "config.json").write_text("{}")
    code, report = inspected(folder, capsys)
    assert code == 1
    assert report["faults"] == [
        "ghost: the index says that it is in model-00001-of-00002.safetensors, where it is not",
        "up.weight.nested_absmax: expected finite scales of 0 or more, got 1 NaN, Inf or negative among 1",
        "norm.bias: 2 of 48 values are NaN or Inf",
        "config.json: expected a quantization_config of bitsandbytes for the NF4 weights, got none; "
        "transformers would take them for ordinary tensors",
    ]
    assert main(["inspect", str(folder)]) == 1
    text = capsys.readouterr().out
    assert text.count("fault: ") == 4 and "4 faults found" in text and "NF4, faulty" in text
    code, report = inspected(folder, capsys, "--quick")
    assert code == 1 and len(report["faults"]) == 3


def test_one_unreadable_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest of the folder is still listed."""
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    code, report = inspected(folder, capsys)
    assert code == 1 and len(report["faults"]) == 1 and "truncated in " in report["faults"][0]
    assert any(tensor["name"] == "up.weight" for tensor in report["tensors"])


def test_nf4_needs_more_than_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"observer.absmax": torch.ones(3)})
    code, report = inspected(path, capsys)
    assert code == 0 and report["tensors"][0]["form"] == "float32"
    write(path, {"up.weight.absmax": torch.ones(3)})
    faults = inspected(path, capsys)[1]["faults"]
    assert faults == ["up.weight: expected a tensor in the state dict, got NoneType"]


def test_folder_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = inspected(tmp_path / "nothing", capsys)
    assert code == 1 and "got nothing there" in report["error"]
    (tmp_path / "pytorch_model.bin").write_text("x")
    code, report = inspected(tmp_path, capsys)
    assert (
        code == 1 and "pytorch_model.bin is another format: save the model as safetensors" in report["error"]
    )


def test_an_adapter_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "adapter_model.safetensors", {"base_model.model.q.lora_A.weight": torch.ones(3, 3)})
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    assert main(["inspect", str(tmp_path)]) == 0
    assert "an adapter, expected a model; its base is the/base" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"peft-kernels {pk.__version__}\n"


def test_tensor_larger_than_one_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overflowing sums are no fault; a NaN in the last chunk is."""
    path = tmp_path / "model.safetensors"
    large = torch.full((3 << 22,), 3e38)
    write(path, {"large": large})
    assert inspected(path, capsys)[1]["faults"] == []
    large[-1] = float("nan")
    write(path, {"large": large})
    assert inspected(path, capsys)[1]["faults"] == [f"large: 1 of {3 << 22} values are NaN or Inf"]


def test_bitsandbytes_own_weights_have_no_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(96, 40, quant_type="nf4", quant_storage=torch.bfloat16)
    layer.load_state_dict({"weight": testing.tensor(40, 96), "bias": torch.zeros(40)})
    layer.to("cpu")
    write(tmp_path / "model.safetensors", layer.state_dict())
    code, report = inspected(tmp_path / "model.safetensors", capsys)
    assert code == 0 and report["tensors"][1]["shape"] == [40, 96]


def test_without_rich(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text without colours."""
    assert main(["inspect", str(folder)]) == 0
    with_rich = capsys.readouterr().out
    for name in ("rich", "rich.console", "rich.table", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out == with_rich


def test_in_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colours, and a progress bar on stderr; brackets in names are not read as rich markup."""
    pytest.importorskip("rich", reason="rich is not installed")
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = folder / "model-00001-of-00002.safetensors"
    write(path, {"[bold]:cat:[/red].0.x": torch.full((4,), float("nan"))})
    assert main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "\x1b[31m" in out and out.count("[bold]:cat:[/red].0.x") == 2 and "4 of 4 values" in out
    assert "checking" in err and "16/16 bytes" in err


def test_progress_without_a_terminal_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(as_json=False).progress(10, "x") as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_size_text() -> None:
    assert [size(n) for n in (0, 999, 1500, 156_288, 8_030_261_248)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "156 kB",
        "8.03 GB",
    ]
