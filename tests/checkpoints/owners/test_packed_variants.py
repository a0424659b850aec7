"""Which configurations of GPTQ, AWQ, int4, int8 and FP8 are read, and which are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from packed_models import KINDS, config_of

from peft_kernels.nf4.owners import OWNERS, owner_of

GROUP = "config_groups.group_0.weights"


def _weights(kind: str, **changed: Any) -> dict[str, Any]:
    groups = config_of(kind)["config_groups"]
    groups["group_0"]["weights"] |= changed
    return {"config_groups": groups}


GPTQ = "'gptq', 'gptq_v2', 'gptq in 8 bits' or 'gptq_v2 in 8 bits'"
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq in 2 bits": ("gptq", {"bits": 2}, "bits: expected 4 or 8, for GPTQ, got 2"),
    "gptq in 8 bits with zero points": (
        "gptq int8",
        {"sym": False},
        "sym: expected true for GPTQ in 8 bits, since int8 has no zero points, got false",
    ),
    "marlin": (
        "gptq",
        {"checkpoint_format": "marlin"},
        f"checkpoint_format: expected {GPTQ} of gptq, got 'marlin'",
    ),
    "format by another name": (
        "gptq",
        {"format": ["gptq"]},
        f"checkpoint_format: expected {GPTQ} of gptq, got ['gptq']",
    ),
    "gptq v2 in 3 bits": ("gptq v2", {"bits": 3}, "bits: expected 4 or 8, for GPTQ v2, got 3"),
    "awq in 8 bits": ("awq", {"bits": 8}, "bits: expected 4, for AWQ, got 8"),
    "gemv": ("awq", {"version": "gemv"}, "version: expected 'gemm' of AWQ, got 'gemv'"),
    "blocks of 64": (
        "fp8",
        {"weight_block_size": [64, 128]},
        "weight_block_size: expected [128, 128] or None, got [64, 128]",
    ),
    "int5": ("packed", _weights("packed", num_bits=5), f"{GROUP}.num_bits: expected 4, for INT4, got 5"),
    "int8 from another zero": (
        "int8 groups",
        _weights("int8 groups", symmetric=False),
        f"{GROUP}.symmetric: expected True, for INT8, got False",
    ),
    "int4 in bytes": ("int8", _weights("int8", num_bits=4), f"{GROUP}.num_bits: expected 8, for INT8, got 4"),
    "floats": (
        "packed", _weights("packed", type="float"), f"{GROUP}.type: expected 'int', for INT4, got 'float'"
    ),
    "one scale": (
        "packed",
        _weights("packed", strategy="tensor"),
        f"{GROUP}.strategy: expected 'group' or 'channel', for INT4, got 'tensor'",
    ),
    "FP8 in 4 bits": (
        "fp8 rows", _weights("fp8 rows", num_bits=4), f"{GROUP}.num_bits: expected 8, for FP8, got 4"
    ),
    "FP8 groups": (
        "fp8 rows",
        _weights("fp8 rows", strategy="group"),
        f"{GROUP}.strategy: expected 'tensor', 'channel' or 'block', for FP8, got 'group'",
    ),
    "FP8 blocks": (
        "fp8 blocks",
        _weights("fp8 blocks", block_structure=[1, 128]),
        f"{GROUP}.block_structure: expected [128, 128], for FP8, got [1, 128]",
    ),
    "a cache": (
        "fp8 rows",
        {"kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme: expected none beside FP8 weights, got {'num_bits': 8}",
    ),
    "rotated": (
        "packed", {"transform_config": {"a": 1}}, "transform_config: expected none beside INT4 weights, got"
    ),
    "another format": (
        "packed",
        {"format": "marlin-24"},
        "format: expected 'nvfp4-pack-quantized', 'mxfp4-pack-quantized', 'pack-quantized', "
        "'float-quantized', 'naive-quantized', 'int-quantized' or 'pack-quantized of 8 bits' of "
        "compressed-tensors, got 'marlin-24'",
    ),
    "modelopt in int4": (
        "fp8 modelopt",
        {"quant_algo": "W4A16_AWQ"},
        "quant_algo: expected 'NVFP4', 'W4A16_NVFP4', 'FP8' or 'FP8_PER_CHANNEL_PER_TOKEN' of modelopt, got "
        "'W4A16_AWQ'",
    ),
    "modelopt's weights": (
        "fp8 modelopt", _weights("fp8 modelopt", num_bits=4), f"{GROUP}.num_bits: expected 8, for FP8, got 4"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", VARIANTS)
def test_unknown_variants(what: str) -> None:
    kind, changed, expected = VARIANTS[what]
    assert owner_of(config_of(kind)) is OWNERS[KINDS[kind].owner]
    with pytest.raises(ValueError) as caught:
        owner_of(config_of(kind) | changed)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "kind, changed",
    [
        ("gptq", {"checkpoint_format": "GPTQ"}),
        ("gptq", {"format": "gptq", "desc_act": True}),
        ("gptq", {"checkpoint_format": None}),
        ("awq", {"version": "GEMM"}),
        ("awq", {"version": None, "format": "gemm"}),
        ("fp8", {"weight_block_size": (128, 128)}),
    ],
    ids=str,
)
def test_known_variants(kind: str, changed: dict[str, Any]) -> None:
    assert owner_of(config_of(kind) | changed) is OWNERS[KINDS[kind].owner]
