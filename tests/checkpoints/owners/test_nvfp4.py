"""NVFP4 checkpoints of compressed-tensors and modelopt: loaded packed, trained, and saved as they were."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from owned_folders import (
    NVFP4,
    assert_same_file,
    dense_twin,
    dense_weight,
    nvfp4,
    nvfp4_config,
    stored,
    trained,
)
from rounding import ONE_STEP
from torch import Tensor
from transformers_models import Auto, ids, logits, nf4_layers, read, transformers

import testing
from peft_kernels.integrations import transformers as integration
from peft_kernels.nf4.owners import OWNERS

peft = pytest.importorskip("peft", reason="adapters are PEFT's, and it is not installed")

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(params=NVFP4)
def owner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


@pytest.fixture
def tensors(owner: str, folder: Path) -> dict[str, Tensor]:
    return nvfp4(folder, owner, activations=True)


def test_layers_are_packed(tensors: dict[str, Tensor], folder: Path) -> None:
    model = read(folder)
    projections = {name for name, _ in model.named_modules() if name.endswith("_proj")}
    assert nf4_layers(model) == projections and len(projections) == 14
    for name in projections:
        weight = model.get_submodule(name).weight
        assert weight._state.format == "nvfp4" and weight.dtype == torch.bfloat16
        assert torch.equal(weight._state.dequantize(torch.float32), dense_weight(tensors, f"{name}.weight"))
    beside = [
        tensor for name, tensor in tensors.items() if "global" in name or name.endswith(("_2", "input_scale"))
    ]
    tables = 256 * 4 * len(projections)  # of what scales mean
    parts = sum(tensor.nbytes for tensor in (*tensors.values(), *model.buffers()))
    assert model.get_memory_footprint() == parts - sum(tensor.nbytes for tensor in beside) + tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = Auto.from_pretrained(dense_twin(folder, tensors, tmp_path / "twin", torch.float32), dtype=dtype)
    truth = copy.deepcopy(plain).double()(ids()).logits.detach()
    testing.assert_close(read(folder, dtype=dtype)(ids()).logits, plain(ids()).logits, truth)


@pytest.mark.parametrize("patch", [False, True])
def test_training_equals_the_dense_model(
    patch: bool, tensors: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    """And the base is saved as it was, after training."""
    twin = dense_twin(folder, tensors, tmp_path / "twin", torch.float32)
    _, expected = trained(Auto.from_pretrained(twin, dtype=torch.float32))
    tuned, found = trained(read(folder, dtype=torch.float32), patch)
    assert found == pytest.approx(expected, rel=ONE_STEP) and found[-1] < 0.95 * found[0]
    tuned.unload().to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", tensors)


@pytest.mark.parametrize("activations", [False, True])
def test_round_trip(owner: str, activations: bool, folder: Path, tmp_path: Path) -> None:
    tensors = nvfp4(folder, owner, activations)
    model = copy.deepcopy(read(folder))
    model.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    assert stored(tmp_path / "saved") == stored(folder) == nvfp4_config(owner, activations)
    read(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert_same_file(tmp_path / "again", tensors)


def test_scales_of_the_cache_are_kept(folder: Path, tmp_path: Path) -> None:
    from checkpoint_damage import change_json, change_tensors

    tensors = nvfp4(folder, "modelopt")
    cache = {f"model.layers.{i}.self_attn.{n}_proj.{n}_scale": torch.rand(()) for i in (0, 1) for n in "kv"}
    change_tensors(folder / "model.safetensors", lambda found: found.update(cache))
    config = nvfp4_config("modelopt") | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    change_json(folder / "config.json", quantization_config=config)
    read(folder).save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", tensors | cache)
    assert stored(tmp_path / "saved") == config


def test_what_has_no_effect_is_logged(owner: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    nvfp4(folder, owner, activations=True)
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        read(folder)
    assert "the quantisation of activations has no effect here: only weights are quantised" in caplog.text
    caplog.clear()
    nvfp4(folder, owner)
    read(folder)
    assert "no effect" not in caplog.text


# Dense weights among packed ones


def merged(folder: Path, targets: str | list[str]) -> Any:
    """A model with one adapter merged."""
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(read(folder), config).merge_and_unload()


def test_merged_layers_are_saved_dense(tensors: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    model = merged(folder, r".*layers\.0.*q_proj")
    model.save_pretrained(tmp_path / "saved")
    assert stored(tmp_path / "saved")["ignore"] == ["lm_head", Q_PROJ]
    again = read(tmp_path / "saved")
    assert Q_PROJ not in nf4_layers(again) and len(nf4_layers(again)) == 13
    assert torch.equal(logits(again), logits(model))
    assert not hasattr(model.get_submodule(Q_PROJ), "aside")
    assert stored(folder)["ignore"] == ["lm_head"], "the configuration that was read is another's"


def test_all_merged_is_an_ordinary_checkpoint(
    tensors: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    model = merged(folder, "all-linear")
    model.save_pretrained(tmp_path / "saved")
    assert stored(tmp_path / "saved") is None
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "saved")), logits(model))


def test_packed_again_after_a_merge(
    owner: str, tensors: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    """modelopt's scale of a weight can be any number; a reciprocal may not exist."""
    config = peft.LoraConfig(r=4, target_modules=r".*layers\.0.*q_proj", init_lora_weights=False)
    tuned = peft.get_peft_model(read(folder), config)
    tuned.merge_adapter()
    tuned.base_model.model.get_submodule(Q_PROJ).base_layer.weight.requantize_()
    model = tuned.unload()
    weight = model.get_submodule(Q_PROJ).weight
    if owner == "compressed-tensors":
        one = weight._state.absmax2[0x38]
        exact = torch.equal(OWNERS[owner].values(1 / one).nan_to_num(), weight._state.absmax2.nan_to_num())
        if not exact:
            with pytest.raises(
                ValueError, match=r"q_proj\.weight_global_scale: expected the scale of the file"
            ):
                model.save_pretrained(tmp_path / "saved")
            return
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(read(tmp_path / "saved")), logits(model))


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


def test_dequantize(tensors: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    model.dequantize()
    twin = Auto.from_pretrained(dense_twin(folder, tensors, tmp_path / "twin", torch.bfloat16))
    assert torch.equal(logits(model), logits(twin))


# Plain from_pretrained


def test_enable(owner: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """The library of the format need not be installed."""
    integration.enable()
    try:
        model = Auto.from_pretrained(folder)
    finally:
        integration.disable()
    assert nf4_layers(model) and torch.equal(logits(model), logits(read(folder)))


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
