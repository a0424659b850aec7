"""`peft-kernels quantize --format` writes what a model loaded with NF4Config(format=...) saves."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import moe_models as moe
import pytest
import torch
import transformers
from checkpoint_damage import change_json, change_tensors
from moe_checkpoints import expert_modules, stored
from moe_checkpoints import saved as saved_mixture
from test_cli_quantize_experts import same_folder
from transformers_models import (
    Auto,
    NF4Config,
    assert_same_state,
    auto,
    gpt2,
    nf4_layers,
    read,
    same_bits,
    saved,
)

import peft_kernels as pk
from peft_kernels.checkpoints import layers
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError, Entry
from peft_kernels.cli.main import main
from peft_kernels.core.formats import FORMATS
from peft_kernels.nf4.bitsandbytes_format import QUANT_TYPES
from peft_kernels.nf4.packed_format import METHOD

OURS = [name for name in FORMATS if name not in QUANT_TYPES]
"""The formats that only this package reads."""
IN_BLOCKS = [name for name in OURS if FORMATS[name].rows_have_blocks]
each_format = pytest.mark.parametrize("format", OURS)
Captured = pytest.CaptureFixture[str]


def blocksize_of(format: str) -> int:
    """The default, or one that the short rows of tiny models have."""
    form = FORMATS[format]
    return min(form.default_blocksize, 32) if form.rows_have_blocks else form.default_blocksize


def quantised(source: Path, target: Path, format: str, *options: str) -> Path:
    options = "--format", format, "--blocksize", str(blocksize_of(format)), *options
    assert main(["quantize", str(source), str(target), *options]) == 0
    return target


def formats_of(model: Any) -> set[str]:
    return {
        parameter._state.format for parameter in model.parameters() if isinstance(parameter, pk.NF4Weight)
    }


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "classifier", "moe"])
@each_format
def test_equals_save_pretrained_of_a_packed_model(format: str, kind: str, tmp_path: Path) -> None:
    """In files and configuration; loaded again it is the model that was packed in memory."""
    source = saved(tmp_path / "dense", kind, shards="100kB")
    ours = quantised(source, tmp_path / "ours", format)
    model = auto(kind).from_pretrained(
        source, quantization_config=NF4Config(blocksize_of(format), format=format), dtype="auto"
    )
    model.save_pretrained(tmp_path / "theirs")
    same_folder(ours, tmp_path / "theirs")
    again = read(ours, kind, dtype="auto")
    assert formats_of(again) == {format} and nf4_layers(again) == nf4_layers(model)
    dense = auto(kind).from_pretrained(source, dtype="auto")
    assert_same_state(again, pk.quantize_model(dense, blocksize=blocksize_of(format), format=format))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@each_format
def test_experts(format: str, kind: str, tmp_path: Path) -> None:
    source = saved_mixture(tmp_path / "dense", kind, torch.bfloat16, max_shard_size="30kB")
    ours = quantised(source, tmp_path / "ours", format, "--experts")
    config = NF4Config(blocksize_of(format), experts=True, format=format)
    model = Auto.from_pretrained(source, quantization_config=config, dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    same_folder(ours, tmp_path / "theirs")
    again = read(ours, dtype="auto")
    assert expert_modules(again).keys() == expert_modules(model).keys() != set()
    assert formats_of(again) == {format}
    assert_same_state(again, model)


@each_format
def test_layers_that_bitsandbytes_would_not_read(format: str, tmp_path: Path) -> None:
    """Falcon's have a class of their own."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=1, eos_token_id=2))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    ours = quantised(tmp_path / "dense", tmp_path / "ours", format)
    config = NF4Config(blocksize_of(format), format=format)
    model = Auto.from_pretrained(tmp_path / "dense", quantization_config=config, dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    same_folder(ours, tmp_path / "theirs")
    assert len(nf4_layers(read(ours))) == 8


@each_format
def test_experts_stay_dense_by_default(format: str, tmp_path: Path, capsys: Captured) -> None:
    source = saved_mixture(tmp_path / "dense", "qwen3_moe", torch.bfloat16)
    ours = quantised(source, tmp_path / "ours", format)
    assert "experts stay dense: --experts packs them" in capsys.readouterr().out
    assert stored(ours)["experts"] is False and not expert_modules(read(ours))


@each_format
def test_inspect(format: str, tmp_path: Path, capsys: Captured) -> None:
    """Layers are not listed as experts, and a faulty one not as NF4."""
    ours = quantised(saved(tmp_path / "dense"), tmp_path / "ours", format)
    capsys.readouterr()
    assert main(["inspect", str(ours), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {tensor["name"]: tensor for tensor in report["tensors"]}
    down = found["model.layers.0-1.mlp.down_proj.weight"]
    assert down["form"].startswith(
        f"{format.upper()} of bfloat16, blocks of {blocksize_of(format)}"
    ) and down["shape"] == [64, 128]
    assert not report["experts"] and report["architecture"] == "LlamaForCausalLM"

    def damage(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight.absmax"].fill_(
            255 if FORMATS[format].by_code else torch.nan
        )

    change_tensors(ours / "model.safetensors", damage)
    change_json(
        ours / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    assert main(["inspect", str(ours)]) == 1
    text = capsys.readouterr().out
    assert "packed, faulty" in text and "NF4" not in text
    assert f"config.json: expected quant_method {METHOD} for the packed weights, got bitsandbytes" in text
    change_json(ours / "config.json", quantization_config=None)
    assert main(["inspect", str(ours)]) == 1
    expected = "expected a quantization_config of peft_kernels for the packed weights, got none"
    assert expected in capsys.readouterr().out


@each_format
def test_options_of_other_formats_are_refused(format: str, tmp_path: Path, capsys: Captured) -> None:
    source, form = saved(tmp_path / "dense"), FORMATS[format]

    def refused(*options: str) -> str:
        assert main(["quantize", str(source), str(tmp_path / "ours"), "--format", format, *options]) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"dense"}
        return capsys.readouterr().err

    assert f"blocksize: expected one of {form.blocksizes}, got 48" in refused("--blocksize", "48")
    if form.takes_double_quant:
        quantised(source, tmp_path / "ours", format, "--no-double-quant")
        assert stored(tmp_path / "ours")["double_quant"] is False
        return
    expected = f"double_quant: expected no choice for {format}, whose scales have one form, got False"
    assert expected in refused("--no-double-quant")
    with pytest.raises(CheckpointError, match="got True"):
        quantize_checkpoint(source, tmp_path / "ours", format=format, double_quant=True)


@pytest.mark.parametrize("format", IN_BLOCKS)
def test_rows_of_broken_blocks_are_refused_before_writing(format: str, tmp_path: Path) -> None:
    """Rows are input features, also of weights that files store transposed."""
    size = blocksize_of(format)
    odd = 64 + size // 2
    gpt2(n_inner=odd).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    name = r"0\.mlp\.c_proj\.weight"
    expected = f"{name}: expected a multiple of {size} input features for {format}, got {odd}$"
    with pytest.raises(CheckpointError, match=expected):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", size, format=format)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}
    quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", size, format=format, skip=["mlp.c_proj"])
    assert any(name.endswith("mlp.c_fc") for name in nf4_layers(read(tmp_path / "ours")))


@pytest.mark.parametrize("format", IN_BLOCKS)
def test_experts_with_rows_of_broken_blocks(format: str, tmp_path: Path) -> None:
    """Such as 40 features; nothing is written."""
    config = transformers.MixtralConfig(
        **moe.SIZES | {"hidden_size": 40, "head_dim": 16}, num_local_experts=2
    )
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    size, skip = blocksize_of(format), ["self_attn"]
    expected = rf"experts\.gate_up_proj: expected a multiple of {size} input features for {format}, got 40$"
    with pytest.raises(CheckpointError, match=expected):
        quantize_checkpoint(
            tmp_path / "dense", tmp_path / "ours", size, skip=skip, experts=True, format=format
        )
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_nan_codes_of_fp8(tmp_path: Path, capsys: Captured) -> None:
    """They are values that no weight has; --quick does not read them."""
    ours = quantised(saved(tmp_path / "dense"), tmp_path / "ours", "fp8")
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(ours / "model.safetensors", lambda tensors: tensors[name][3:5].fill_(127))
    assert main(["inspect", str(ours)]) == 1
    assert f"fault: {name}: expected codes of finite values, got 2 NaN among them" in capsys.readouterr().out
    assert main(["inspect", str(ours), "--quick"]) == 0
    with pytest.raises(ValueError, match=f"^{name}: expected codes of finite values"):
        read(ours)


@pytest.mark.parametrize("format", FORMATS)
def test_one_dense_tensor_at_a_time(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are not quantised are copied in chunks and never become tensors."""
    source = saved(tmp_path / "dense")
    alive: list[weakref.ref[Any]] = []
    names, original = [], Entry.read

    def watched(self: Entry) -> torch.Tensor:
        assert not [one for ref in alive if (one := ref()) is not None]
        tensor = original(self)
        names.append(self.name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(Entry, "read", watched)
    done = quantize_checkpoint(source, tmp_path / "ours", blocksize_of(format), format=format)
    assert sorted(names) == sorted(done.choice.quantise)


@pytest.mark.parametrize("format", FORMATS)
def test_nan_is_refused_by_name(format: str, tmp_path: Path) -> None:
    source, name = saved(tmp_path / "dense"), "model.layers.1.mlp.up_proj.weight"
    change_tensors(source / "model.safetensors", lambda tensors: tensors[name][3, 4].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"1\.mlp\.up_proj\.weight: expected finite values, got 1"):
        quantize_checkpoint(source, tmp_path / "ours", blocksize_of(format), format=format)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@each_format
def test_without_transformers(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names and shapes; `load_checkpoint` reads it."""

    def missing(checkpoint: Checkpoint) -> Any:
        raise ImportError("no transformers")

    source = saved(tmp_path / "dense")
    monkeypatch.setattr(layers, "on_meta", missing)
    done = quantize_checkpoint(source, tmp_path / "ours", blocksize_of(format), format=format)
    assert "names and shapes" in done.choice.source and stored(tmp_path / "ours")["format"] == format
    model = Auto.from_pretrained(source, dtype="auto")
    small = ("k_proj", "v_proj")  # too small to be recognised by their shapes
    pk.quantize_model(model, skip=("lm_head", *small), blocksize=blocksize_of(format), format=format)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pk.load_checkpoint(model, tmp_path / "ours")
    assert all(same_bits(before[name], tensor) for name, tensor in model.state_dict().items())
