"""Models loaded from int4 and FP8 checkpoints: computed with, trained, merged, and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from owned_folders import assert_same_file, stored, trained
from packed_models import KINDS, Made, config_of, dense_twin
from rounding import ONE_STEP
from transformers_models import Auto, ids, logits, nf4_layers, read

import testing

peft = pytest.importorskip("peft", reason="adapters are PEFT's, and it is not installed")

TRAINED = ("gptq", "awq rows", "packed zeros", "fp8 static", "fp8 modelopt")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=TRAINED)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def twin(made: Made, folder: Path) -> Path:
    return dense_twin(folder, made, folder.parent / "twin", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(made: Made, folder: Path, twin: Path, dtype: torch.dtype) -> None:
    plain = Auto.from_pretrained(twin, dtype=dtype)
    truth = copy.deepcopy(plain).double()(ids()).logits.detach()
    testing.assert_close(read(folder, dtype=dtype)(ids()).logits, plain(ids()).logits, truth)


def test_values_in_every_dtype(made: Made, folder: Path) -> None:
    """The kernels' values are the format's, to the bit."""
    model = read(folder)
    for name, dense in made.dense.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(model.get_parameter(name)._state.dequantize(dtype), dense.to(dtype))


@pytest.mark.parametrize("patch", [False, True])
def test_training_equals_the_dense_model(
    patch: bool, made: Made, folder: Path, twin: Path, tmp_path: Path
) -> None:
    """And the base is saved as it was, after training."""
    _, expected = trained(Auto.from_pretrained(twin, dtype=torch.float32))
    tuned, found = trained(read(folder, dtype=torch.float32), patch)
    assert found == pytest.approx(expected, rel=ONE_STEP) and found[-1] < 0.95 * found[0]
    tuned.unload().to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", made.tensors)


def tuned_q_proj(folder: Path, **options: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=r".*layers\.0.*q_proj", init_lora_weights=False)
    return peft.get_peft_model(read(folder, **options), config)


def test_merged_layers_are_saved_dense(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    model = tuned_q_proj(folder).merge_and_unload()
    model.save_pretrained(tmp_path / "saved")
    before, after = config_of(kind), stored(tmp_path / "saved")
    if kind == "gptq":
        merged = {r"-:^model\.layers\.0\.self_attn\.q_proj(\.|$)": {}}
        assert after == before | {"dynamic": before["dynamic"] | merged}
    else:
        key = "ignore" if "config_groups" in before else "modules_to_not_convert"
        assert after == before | {key: [*before.get(key, ()), Q_PROJ]}
    again = read(tmp_path / "saved")
    assert Q_PROJ not in nf4_layers(again) and len(nf4_layers(again)) == 6
    assert torch.equal(logits(again), logits(model))
    assert not hasattr(model.get_submodule(Q_PROJ), "aside")


def test_packed_again_after_a_merge(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    """What a file cannot hold is refused: scales of rows where there was one for all."""
    tuned = tuned_q_proj(folder, dtype=torch.float32)
    tuned.merge_adapter()
    weight = tuned.base_model.model.get_submodule(Q_PROJ).base_layer.weight
    weight.requantize_()
    assert weight._state.format == KINDS[kind].format and weight._state.dense is None
    model = tuned.unload()
    if kind == "fp8 modelopt":
        with pytest.raises(ValueError, match=r"q_proj\.weight_scale: expected scales that torch\.float32 of"):
            model.save_pretrained(tmp_path / "saved")
        return
    model.save_pretrained(tmp_path / "saved")
    assert stored(tmp_path / "saved") == config_of(kind)
    assert torch.equal(logits(read(tmp_path / "saved", dtype=torch.float32)), logits(model))


def test_all_merged_is_an_ordinary_checkpoint(made: Made, folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(read(folder), config).merge_and_unload()
    model.save_pretrained(tmp_path / "saved")
    assert stored(tmp_path / "saved") is None
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "saved")), logits(model))


def test_dequantize(made: Made, folder: Path) -> None:
    model = read(folder)
    model.dequantize()
    assert not nf4_layers(model)
    for name, dense in made.dense.items():
        assert torch.equal(model.get_parameter(name), dense.bfloat16())
