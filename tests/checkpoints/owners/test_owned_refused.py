"""What cannot be read of other owners' checkpoints: each error names the tensor or the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from owned_folders import FILE, NVFP4, gpt_oss, nvfp4, nvfp4_config
from torch import Tensor
from transformers_models import NF4Config, read, read_config

Change = Callable[[dict[str, Tensor]], Any]

BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
MXFP4: dict[str, tuple[Change, str]] = {
    "truncated": (
        lambda t: t.update({BLOCKS: t[BLOCKS][:, :, :2].contiguous()}),
        rf"{BLOCKS}: expected shape \(4, 64, 3, 16\), got \(4, 64, 2, 16\)",
    ),
    "half a block": (
        lambda t: t.update({BLOCKS: t[BLOCKS][..., :8].contiguous()}),
        rf"{BLOCKS}: expected shape \(4, 64, 3, 16\), got \(4, 64, 3, 8\)",
    ),
    "flat scales": (
        lambda t: t.update({SCALES: t[SCALES].view(4, -1)}),
        rf"{SCALES}: expected shape \(experts, out, in / 32\), got \(4, 192\)",
    ),
    "no scales": (lambda t: t.pop(SCALES), f"{SCALES}: expected this tensor of a packed weight, got none"),
    "no blocks": (lambda t: t.pop(BLOCKS), f"{BLOCKS}: expected this tensor of a packed weight, got none"),
    "NaN scale": (
        lambda t: t[SCALES].view(-1)[5:7].fill_(255),
        f"{SCALES}: expected finite scales of 0 or more, got 2 NaN, Inf or negative among 768",
    ),
    "signed blocks": (
        lambda t: t.update({BLOCKS: t[BLOCKS].view(torch.int8)}),
        f"{BLOCKS}: expected dtype torch.uint8, got torch.int8",
    ),
    "fewer experts": (
        lambda t: t.update({BLOCKS: t[BLOCKS][:3].contiguous(), SCALES: t[SCALES][:3].contiguous()}),
        r"model\.layers\.1\.mlp\.experts\.down_proj: expected shape \(4, 64, 96\), got \(3, 64, 96\)",
    ),
}


@pytest.mark.parametrize("what", MXFP4)
def test_damaged_mxfp4(what: str, tmp_path: Path) -> None:
    change, expected = MXFP4[what]
    gpt_oss(tmp_path)
    change_tensors(tmp_path / FILE, change)
    with pytest.raises(ValueError, match=f"^{expected}$"):
        read(tmp_path)


Q = "model.layers.1.self_attn.q_proj.weight"
PACKED, SCALE, WHOLE = f"{Q}_packed", f"{Q}_scale", f"{Q}_global_scale"


def _with(name: str, code: int) -> Change:
    return lambda t: t[name].view(torch.uint8).view(-1)[3:4].fill_(code)


BROKEN: dict[str, tuple[Change, str]] = {
    "truncated": (
        lambda t: t.update({PACKED: t[PACKED][:, :-8].contiguous()}),
        rf"{SCALE}: expected shape \(64, 3\), got \(64, 4\)",
    ),
    "half a block": (
        lambda t: t.update({PACKED: t[PACKED][:, :-1].contiguous()}),
        f"{PACKED}: expected rows of whole blocks of 16, got 62 codes",
    ),
    "no codes": (lambda t: t.pop(PACKED), f"{PACKED}: expected this tensor of a packed weight, got none"),
    "no scales": (lambda t: t.pop(SCALE), f"{SCALE}: expected this tensor of a packed weight, got none"),
    "no scale": (lambda t: t.pop(WHOLE), f"{WHOLE}: expected this tensor of a packed weight, got none"),
    "NaN": (
        _with(SCALE, 0x7F),
        f"{SCALE}: expected finite scales of 0 or more, got 1 NaN, Inf or negative among 256",
    ),
    "-1": (
        _with(SCALE, 0xB8),
        f"{SCALE}: expected finite scales of 0 or more, got 1 NaN, Inf or negative among 256",
    ),
    "zero": (lambda t: t[WHOLE].zero_(), f"{WHOLE}: expected a number above 0, got 0.0"),
    "negative": (lambda t: t[WHOLE].neg_(), rf"{WHOLE}: expected a number above 0, got -\d+.*"),
    "inf": (lambda t: t[WHOLE].fill_(torch.inf), f"{WHOLE}: expected a number above 0, got inf"),
    "nan": (lambda t: t[WHOLE].fill_(torch.nan), f"{WHOLE}: expected a number above 0, got nan"),
    "two": (
        lambda t: t.update({WHOLE: t[WHOLE].repeat(2)}),
        rf"{WHOLE}: expected one number, got shape \(2,\)",
    ),
    "scales in bf16": (
        lambda t: t.update({SCALE: t[SCALE].bfloat16()}),
        f"{SCALE}: expected dtype torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "fewer rows": (
        lambda t: t.update({PACKED: t[PACKED][:32].contiguous(), SCALE: t[SCALE][:32].contiguous()}),
        rf"{Q}: expected shape \(64, 64\), got \(32, 64\)",
    ),
    "FP8 layer": (
        lambda t: (t.pop(PACKED), t.pop(WHOLE), t.update({Q: torch.ones(64, 64).to(torch.float8_e4m3fn)})),
        f"{PACKED}: expected this tensor of a packed weight, got none",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_damaged_nvfp4(what: str, tmp_path: Path) -> None:
    change, expected = BROKEN[what]
    nvfp4(tmp_path, "compressed-tensors")
    change_tensors(tmp_path / FILE, change)
    with pytest.raises(ValueError, match=f"^{expected}$"):
        read(tmp_path)


def test_modelopt_without_scales(tmp_path: Path) -> None:
    nvfp4(tmp_path, "modelopt")
    change_tensors(tmp_path / FILE, lambda t: t.pop(f"{Q}_scale"))
    with pytest.raises(ValueError, match=f"^{Q}_scale: expected this tensor"):
        read(tmp_path)


def test_packed_embeddings(tmp_path: Path) -> None:
    nvfp4(tmp_path, "compressed-tensors")
    name = "model.embed_tokens.weight"

    def pack(tensors: dict[str, Tensor]) -> None:
        del tensors[name]
        tensors |= {
            f"{name}_packed": torch.zeros(128, 32, dtype=torch.uint8),
            f"{name}_global_scale": torch.ones(1),
        }

    change_tensors(tmp_path / FILE, pack)
    with pytest.raises(
        ValueError, match=rf"^{name}: expected a dense weight for an Embedding, got NVFP4 of c"
    ):
        read(tmp_path)


# Configurations

GROUP = "config_groups.group_0.weights"


def _weights(**changed: Any) -> dict[str, Any]:
    weights = nvfp4_config("compressed-tensors")["config_groups"]["group_0"]["weights"]
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changed}}}


VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixed": (
        "compressed-tensors",
        {"format": "mixed-precision"},
        "format: expected 'nvfp4-pack-quantized', 'mxfp4-pack-quantized', 'pack-quantized', "
        "'float-quantized', 'naive-quantized', 'int-quantized' or 'pack-quantized of 8 bits' of "
        "compressed-tensors, got 'mixed-precision'; layers in several formats are not loaded",
    ),
    "int4": ("compressed-tensors", {"format": "pack-quantized"}, f"{GROUP}.type: expected 'int', for INT4"),
    "group size": (
        "compressed-tensors",
        _weights(group_size=32),
        f"{GROUP}.group_size: expected 16, for NVFP4, got 32",
    ),
    "bits": ("compressed-tensors", _weights(num_bits=8), f"{GROUP}.num_bits: expected 4, for NVFP4, got 8"),
    "integers": (
        "compressed-tensors",
        _weights(type="int"),
        f"{GROUP}.type: expected 'float', for NVFP4, got 'int'",
    ),
    "zero points": ("compressed-tensors", _weights(symmetric=False), f"{GROUP}.symmetric: expected True"),
    "activations alone": (
        "compressed-tensors",
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}},
        f"{GROUP}: expected NVFP4 weights, got None",
    ),
    "no groups": (
        "compressed-tensors",
        {"config_groups": {}},
        "config_groups: expected groups of NVFP4 weights",
    ),
    "named group": (
        "modelopt",
        {"config_groups": {"NVFP4": ["Linear"]}},
        "config_groups.NVFP4.weights: expected",
    ),
    "cache": (
        "compressed-tensors",
        {"kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme: expected none beside",
    ),
    "rotated": (
        "compressed-tensors",
        {"transform_config": {"a": 1}},
        "transform_config: expected none beside",
    ),
    "sparse": ("compressed-tensors", {"sparsity_config": {"a": 1}}, "sparsity_config: expected none beside"),
    "modelopt fp8": ("modelopt", {"quant_algo": "FP8"}, f"{GROUP}.num_bits: expected 8, for FP8, got 4"),
    "awq": (
        "modelopt",
        {"quant_algo": "NVFP4_AWQ"},
        "quant_algo: expected 'NVFP4', 'W4A16_NVFP4', 'FP8' or 'FP8_PER_CHANNEL_PER_TOKEN' of modelopt, got "
        "'NVFP4_AWQ'",
    ),
    "modelopt group": ("modelopt", _weights(group_size=32), f"{GROUP}.group_size: expected 16"),
}


@pytest.mark.parametrize("what", VARIANTS)
def test_unknown_variants(what: str, tmp_path: Path) -> None:
    owner, changed, expected = VARIANTS[what]
    nvfp4(tmp_path, owner)
    change_json(tmp_path / "config.json", quantization_config=nvfp4_config(owner) | changed)
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("owner", NVFP4)
def test_known_variants(owner: str) -> None:
    """Keys without values, and those of other versions."""
    for extra in (
        {"kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}},
        {"version": "0.9"},
    ):
        assert NF4Config.from_dict(nvfp4_config(owner) | extra).stored == nvfp4_config(owner) | extra


def test_stored_configurations() -> None:
    with pytest.raises(ValueError, match=r"^stored: expected the configuration of one of mxfp4, compressed"):
        NF4Config(format="mxfp4", stored={"quant_method": "hqq"})
    with pytest.raises(ValueError, match=r"^quant_algo: expected 'NVFP4', .* of modelopt, got 'INT4'"):
        NF4Config(format="nvfp4", stored=nvfp4_config("modelopt") | {"quant_algo": "INT4"})


def test_unknown_keys_of_our_own() -> None:
    """Perhaps of a later version: without them the weights might be others."""
    expected = r"^quantization_config: expected keys among blocksize, .*, got 'more'$"
    with pytest.raises(ValueError, match=expected):
        NF4Config.from_dict(NF4Config(format="mxfp4").to_dict() | {"more": 1})


def test_other_methods_are_still_refused(tmp_path: Path) -> None:
    nvfp4(tmp_path, "modelopt")
    for method in ("hqq", ["mxfp4"], None):
        change_json(tmp_path / "config.json", quantization_config={"quant_method": method})
        with pytest.raises(ValueError, match=r"^quantization_config: expected bitsandbytes in 4 bits"):
            read_config(tmp_path)
