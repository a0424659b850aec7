"""`inspect` reports incomplete models and changed files of interrupted runs, `quantize` refuses them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors, write
from models import tiny_llama
from test_cli_quantize import contents, interrupted

from peft_kernels.checkpoints import convert
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.checkpoints.folder import INDEX, Checkpoint
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.cli.main import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
Q = "model.layers.1.self_attn.q_proj.weight"


def tiny_model(kind: str, **sizes: Any) -> Any:
    config = getattr(transformers, kind.removesuffix("ForCausalLM").removesuffix("ForMaskedLM") + "Config")
    return getattr(transformers, kind)(config(**SIZES | sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_model("Qwen2ForCausalLM", tie_word_embeddings=True),
    "mixture": lambda: tiny_model("MixtralForCausalLM", num_local_experts=4),
    "base": lambda: tiny_llama().model,
    "bert": lambda: tiny_model("BertForMaskedLM"),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    ),
}


def saved(folder: Path, model: Any = None, **options: Any) -> Path:
    (model or tiny_llama()).to(torch.bfloat16).save_pretrained(folder, **options)
    return folder


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    code = main(["inspect", str(folder), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == bool(report["faults"])
    return report


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    change_tensors(folder / "model.safetensors", change)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_have_no_faults(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before and after quantising."""
    model = MODELS[name]()
    source = saved(tmp_path / "source", model)
    quantize_checkpoint(source, tmp_path / "target", experts=name == "mixture")
    for folder in (source, tmp_path / "target"):
        report = inspected(folder, capsys)
        assert report["faults"] == [] and report["architecture"] == type(model).__name__


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "layer": (
        "llama",
        lambda s: s.pop(Q),
        f"{Q}: expected this tensor, as LlamaForCausalLM has it, got none",
    ),
    "norm": ("llama", lambda s: s.pop("model.norm.weight"), "model.norm.weight: expected this tensor"),
    "head": ("llama", lambda s: s.pop("lm_head.weight"), "lm_head.weight: expected this tensor"),
    "shape": (
        "llama",
        lambda s: s.update({Q: s[Q][:32]}),
        f"{Q}: expected shape (64, 64), as LlamaForCausalLM has it, got (32, 64)",
    ),
    "embedding": (
        "tied",
        lambda s: s.pop("model.embed_tokens.weight"),
        "model.embed_tokens.weight: expected this",
    ),
    "expert": (
        "mixture",
        lambda s: [s.pop(k) for k in [*s] if "layers.1" in k and "experts.3.w" in k],
        "model.layers.1.mlp.experts.gate_up_proj: expected parts of a tensor of shape (4, 192, 64)",
    ),
    "experts": (
        "mixture",
        lambda s: [s.pop(k) for k in [*s] if "layers.1" in k and ".experts." in k and ".w2." in k],
        "model.layers.1.mlp.experts.down_proj: expected this tensor",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_missing_tensors_of_the_architecture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, damage, message = DAMAGES[name]
    source = saved(tmp_path / "source", MODELS[kind]())
    edit(source, damage)
    faults = inspected(source, capsys)["faults"]
    assert faults and faults[0].startswith(message), faults
    assert main(["quantize", str(source), str(tmp_path / "target")]) == 1
    error = capsys.readouterr().err
    assert message in error and "--partial quantises what is there" in error
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".*"))
    quantize_checkpoint(source, tmp_path / "target", partial=True)


def test_packed_folder_without_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_checkpoint(saved(tmp_path / "source"), tmp_path / "target")
    edit(tmp_path / "target", lambda state: [state.pop(name) for name in [*state] if name.startswith(Q)])
    assert inspected(tmp_path / "target", capsys)["faults"] == [
        f"{Q}: expected this tensor, as LlamaForCausalLM has it, got none"
    ]


def test_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index names the missing shard; without one, the names of the other files do, for any model."""
    source = saved(tmp_path / "source", max_shard_size="60KB")
    (source / INDEX).unlink()
    first, second, *_ = sorted(source.glob("*.safetensors"))
    assert inspected(source, capsys)["faults"] == []
    second.unlink()
    (source / "config.json").write_text("{}")
    message = f"{second.name}: expected this file next to {first.name}, got none"
    assert inspected(source, capsys)["faults"] == [message]
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, tmp_path / "target")


def test_incomparable_models_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "source")
    config = (source / "config.json").read_text()
    for changes, words in (
        ({"architectures": ["LlamaWithMore"]}, "transformers has no LlamaWithMore"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"quantization_config": {"quant_method": "hqq"}}, "it is quantised by hqq"),
    ):
        (source / "config.json").write_text(config)
        change_json(source / "config.json", **changes)
        assert main(["inspect", str(source)]) == 0
        text = capsys.readouterr().out
        assert "not compared with an architecture: " in text and words in text


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_non_finite_norm_is_refused(bad: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float(bad)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 1 of 64 values are NaN or Inf"):
        quantize_checkpoint(saved(tmp_path / "source", model), tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_configurations_are_not_copied_without_their_weights(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    files = {
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "dense",
        "adapter_config.json": "{}", "adapter_model.safetensors": "adapter", "pytorch_model.bin": "again",
        "onnx/config.json": "{}", "onnx/model.onnx": "again", "lora/adapter_config.json": "{}",
        "lora/adapter_model.safetensors": "lora", "lora/.cache/junk": "x", "other.safetensors": "x",
    }  # fmt: skip
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    done = quantize_checkpoint(source, tmp_path / "target")
    there = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*.*")}
    left = {name for name in files if not (tmp_path / "target" / name).exists()}
    assert left == {
        "pytorch_model.bin", "onnx/config.json", "onnx/model.onnx", "lora/.cache/junk", "other.safetensors"
    }  # fmt: skip
    assert done.left_out == ["onnx", "other.safetensors", "pytorch_model.bin"] and there >= set(done.copied)
    assert (tmp_path / "target" / "2_Dense" / "model.safetensors").read_text() == "dense"


def test_files_are_synced_before_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", max_shard_size="100KB")
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tool.jinja").write_text("x")
    synced: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked(old: Any, new: Any) -> None:
        if Path(new).name == "target":
            paths = [Path(old), *Path(old).rglob("*")]
            assert len(paths) > 6
            assert [path.name for path in paths if path.stat().st_ino not in synced] == []
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    quantize_checkpoint(source, tmp_path / "target")
    assert (tmp_path / "target" / INDEX).exists()


# Interrupted runs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source", max_shard_size="100KB")


@pytest.fixture
def partial(source: Path, tmp_path: Path) -> Path:
    """The destination of a run that was interrupted after the first of two shards."""
    interrupted(source, tmp_path / "target")
    return tmp_path / ".target.partial" / "model"


def test_resumed_run_drops_foreign_files(source: Path, partial: Path, tmp_path: Path) -> None:
    """Nor is a shard that no run has recorded as done."""
    (partial / "evil.py").write_text("x")
    (partial / "more").mkdir()
    second = sorted(source.glob("*.safetensors"))[1].name
    shutil.copyfile(next(partial.glob("*.safetensors")), partial / second)
    done = quantize_checkpoint(source, tmp_path / "target")
    assert len(done.taken_over) == 1 and not partial.exists()
    quantize_checkpoint(source, tmp_path / "whole")
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def reformat(path: Path) -> None:
    state = dict(Checkpoint.open(path))
    name = next(name for name in state if state[name].dtype == torch.bfloat16)
    write(path, state | {name: state[name].half()})


@pytest.mark.parametrize("damage", [flip, reformat])
def test_changed_shard(damage: Callable[[Path], None], source: Path, partial: Path, tmp_path: Path) -> None:
    damage(next(partial.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=r"expected the shard that an earlier run made.*--restart"):
        quantize_checkpoint(source, tmp_path / "target")
    quantize_checkpoint(source, tmp_path / "target", restart=True)
    quantize_checkpoint(source, tmp_path / "whole")
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_source_changed_while_it_is_read(source: Path, tmp_path: Path) -> None:
    def progress(name: str, nbytes: int) -> None:
        os.utime(sorted(source.glob("*.safetensors"))[0], ns=(1, 1))

    with pytest.raises(CheckpointError, match="expected files that do not change meanwhile, got"):
        quantize_checkpoint(source, tmp_path / "target", progress=progress)
    assert not (tmp_path / "target").exists()
    assert convert.quantize_checkpoint(source, tmp_path / "target", restart=True)
