"""Parts of owners' formats that no tiny model reaches."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from owned_folders import nvfp4, nvfp4_config, values
from transformers_models import NF4Config, logits, read

from peft_kernels.integrations.transformers import NF4Quantizer
from peft_kernels.nf4.owners import OWNERS, owner, owner_of


@pytest.mark.parametrize("part", [1, 7, 24, 1000])
def test_nibbles_are_swapped_in_parts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_PART", part)
    codes = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = owner.swapped(codes.mT)
    assert found.is_contiguous() and torch.equal(
        values(found), values(codes.mT).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    )
    assert torch.equal(owner.swapped(found), codes.mT)


def test_bytes_of_a_weight_for_device_maps() -> None:
    forms: dict[str, Any] = {
        "mxfp4": (None, 0.5 + 1 / 32),
        "nvfp4": (None, 0.5 + 1 / 16),
        "nf4": (64, 0.5 + 4 / 64),
        "int4": (None, 0.5 + 3 / 64),
        "fp8": (None, 1 + 4 / 128**2),
    }
    for form, (blocksize, expected) in forms.items():
        config = NF4Config(blocksize, double_quant=False, format=form)
        assert NF4Quantizer(config, pre_quantized=True).quantized_element_size == expected


def test_plans_for_tensor_parallelism_are_refused() -> None:
    quantizer = NF4Quantizer(NF4Config.from_dict(nvfp4_config("modelopt")), pre_quantized=True)
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2)))
    with pytest.raises(
        ValueError, match=r"^distributed_config: expected none for a checkpoint in NVFP4 of modelopt"
    ):
        quantizer._prepare_to_cut(model, [])


@pytest.mark.parametrize(
    "config", [{}, {"quant_method": "hqq"}, {"quant_method": ["mxfp4"]}, {"quant_method": {}}]
)
def test_no_owner(config: Any) -> None:
    assert owner_of(config) is None


def test_marks() -> None:
    names = {
        "mxfp4": {"a.up_blocks": "a.up", "a.up_scales": "a.up", "a.up_bias": None, "_blocks": None},
        "compressed-tensors": {
            "a.weight_packed": "a.weight",
            "a.weight_global_scale": "a.weight",
            "a.weight_scale": None,
            "a.weight": None,
            "a.input_global_scale": None,
        },
        "modelopt": {
            "a.weight_scale_2": "a.weight",
            "a.weight": None,
            "a.weight_scale": None,
            "a.b_scale_2": None,
        },
        "gptq": {
            "a.qweight": "a.weight",
            "a.qzeros": "a.weight",
            "a.scales": "a.weight",
            "a.g_idx": None,
            "scales": None,
            "a.my_scales": None,
        },
        "compressed-tensors-int4": {
            "a.weight_packed": "a.weight",
            "a.weight_scale": "a.weight",
            "a.weight_shape": None,
        },
        "fp8": {"a.weight_scale_inv": "a.weight", "a.weight": None, "a.activation_scale": None},
    }
    for method, expected in names.items():
        assert {name: OWNERS[method].weight_of(name) for name in expected} == expected


def test_kept_tensors_are_copies() -> None:
    """Of a mapped file, or of a GPU's memory, they would keep more than themselves."""
    file = {
        "weight": torch.zeros(1, 8, dtype=torch.uint8),
        "weight_scale": torch.ones(1, 1, dtype=torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(3.0),
    }
    _, aside = OWNERS["modelopt"].read(file, "a.weight")
    for name in ("weight_scale_2", "input_scale"):
        file[name].zero_()
    assert {name: float(tensor) for name, tensor in aside.items()} == {
        "weight_scale_2": 0.5,
        "input_scale": 3.0,
    }


def test_copies_and_pickles_are_saved_too(tmp_path: Path) -> None:
    nvfp4(tmp_path / "one", "compressed-tensors", activations=True)
    model = read(tmp_path / "one")
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.save_pretrained(tmp_path / str(number))
        file = "model.safetensors"
        assert (tmp_path / "one" / file).stat().st_size == (tmp_path / str(number) / file).stat().st_size
        assert torch.equal(logits(read(tmp_path / str(number))), logits(model))
