"""Packed weights of a folder, read as the dense ones that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, write
from owned_folders import FILE, gpt_oss
from packed_models import Made, config_of, gptq, make
from transformers_models import transformers

from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.owned_entries import PackedEntry, as_dense

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("owned")


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    return make(folder, "gptq", num_hidden_layers=1)


DTYPES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "none": ({}, torch.bfloat16),
    "no float": ({"dtype": "int8"}, torch.bfloat16),
    "dtype": ({"dtype": "float16"}, torch.float16),
    "older": ({"torch_dtype": "float32"}, torch.float32),
    "both": ({"torch_dtype": "float32", "dtype": "float16"}, torch.float16),
    "with its module": ({"dtype": "torch.float32"}, torch.float32),
    "text": ({"text_config": {"dtype": "float32"}}, torch.float32),
    "text and whole": ({"dtype": "float16", "text_config": {"dtype": "float32"}}, torch.float16),
}


@pytest.mark.parametrize("case", DTYPES)
def test_dtype_of_config(case: str, folder: Path, made: Made, tmp_path: Path) -> None:
    """Values are rounded once, from those of the format."""
    config, dtype = DTYPES[case]
    old = json.loads((folder / "config.json").read_text())
    plain = {key: value for key, value in old.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(plain | config))
    (tmp_path / FILE).symlink_to(folder / FILE)
    dense = as_dense(Checkpoint.open(tmp_path))
    assert "quantization_config" not in dense.config
    for name, values in made.dense.items():
        found, entry = dense[name], dense.entries[name]
        assert found.dtype == entry.dtype == dtype and entry.nbytes == found.nbytes
        assert torch.equal(found, values.to(dtype)), name


def test_place_in_the_files(folder: Path, made: Made) -> None:
    """That of the codes, which other items need not be near."""
    checkpoint = Checkpoint.open(folder)
    for name in made.dense:
        entry, codes = as_dense(checkpoint).entries[name], checkpoint.entries[f"{name[:-6]}qweight"]
        assert (entry.path, entry.begin) == (codes.path, codes.begin)


@pytest.mark.parametrize("nbytes", [1 << 20, 1000])
def test_pieces(nbytes: int, folder: Path, made: Made, tmp_path: Path) -> None:
    """Of a layer, and of experts, which are read one by one."""
    gpt_oss(tmp_path, num_hidden_layers=1)
    experts, layers = (as_dense(Checkpoint.open(each)).entries for each in (tmp_path, folder))
    packed = [each for each in (*experts.values(), layers[Q]) if isinstance(each, PackedEntry)]
    assert sorted(len(each.shape) for each in packed) == [2, 3, 3]
    for entry in packed:
        pieces = [*entry.pieces(nbytes)]
        assert max(map(len, pieces)) <= nbytes
        assert b"".join(pieces) == entry.read().view(-1).view(torch.uint8).numpy().tobytes(), entry.name


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's layers have weights (in, out) when they are dense."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=32)
    name = "transformer.h.0.attn.c_attn."
    parts, values = gptq(192, 64)
    write(tmp_path / FILE, {name + part: tensor for part, tensor in parts.items()})
    config.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", quantization_config=config_of("gptq"), dtype="float32")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    dense = as_dense(Checkpoint.open(tmp_path), model)
    assert dense.entries[f"{name}weight"].shape == (64, 192)
    assert torch.equal(dense[f"{name}weight"], values.T)
