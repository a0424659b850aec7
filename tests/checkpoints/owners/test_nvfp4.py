"""NVFP4 checkpoints of compressed-tensors and modelopt: what other formats do not have. With those they have
in common: test_packed.py and test_packed_training.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from owned_folders import NVFP4, assert_same_file, nvfp4, nvfp4_config, stored
from transformers_models import read, transformers

from peft_kernels.integrations import transformers as integration
from peft_kernels.nf4.owners import OWNERS


@pytest.mark.parametrize("owner", NVFP4)
def test_without_activations(owner: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = nvfp4(tmp_path / "packed", owner)
    model = copy.deepcopy(read(tmp_path / "packed"))
    assert "no effect" not in caplog.text
    model.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    assert stored(tmp_path / "saved") == stored(tmp_path / "packed") == nvfp4_config(owner)
    read(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert_same_file(tmp_path / "again", tensors)


def test_scales_of_the_cache_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    tensors = nvfp4(folder, "modelopt")
    cache = {f"model.layers.{i}.self_attn.{n}_proj.{n}_scale": torch.rand(()) for i in (0, 1) for n in "kv"}
    change_tensors(folder / "model.safetensors", lambda found: found.update(cache))
    config = nvfp4_config("modelopt") | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    change_json(folder / "config.json", quantization_config=config)
    read(folder).save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", tensors | cache)
    assert stored(tmp_path / "saved") == config


@pytest.mark.parametrize("exact", [True, False])
def test_reciprocals_of_scales(exact: bool) -> None:
    """Of a power of two there is one."""
    owner, codes = OWNERS["compressed-tensors"], torch.zeros(1, 8, dtype=torch.uint8)
    scales = torch.ones(1, 1, dtype=torch.float8_e4m3fn)
    file = {
        "weight_packed": codes,
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([3.0]),
    }
    state, aside = owner.read(file, "a.weight")
    state.absmax2 = OWNERS["modelopt"].values(torch.tensor(0.25 if exact else 0.1))
    if exact:
        found = owner.write(state, aside, "a.weight")["a.weight_global_scale"]
        assert torch.equal(found, torch.tensor([4.0]))
    else:
        with pytest.raises(ValueError, match=r"^a\.weight_global_scale: expected the scale of the file"):
            owner.write(state, aside, "a.weight")


def test_other_formats_of_compressed_tensors_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.quantizers import auto

    class Theirs(transformers.BitsAndBytesConfig):
        @classmethod
        def from_dict(cls, config: Any, **_: Any) -> Any:
            return "theirs", config

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", Theirs)
    integration.enable()
    try:
        config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
        assert auto.AutoQuantizationConfig.from_dict(config) == ("theirs", config)
    finally:
        integration.disable()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is Theirs
