"""Formats of packed checkpoints that other libraries own.

A checkpoint's `quant_method` names its owner, and often another key which of its formats; the names of its
tensors tell which weights are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .awq import Awq
from .compressed_tensors import (
    CompressedTensorsFp8,
    CompressedTensorsInt4,
    CompressedTensorsInt8,
    CompressedTensorsInt8Words,
    CompressedTensorsMxfp4,
    CompressedTensorsNvfp4,
)
from .finegrained_fp8 import FineGrainedFp8, FineGrainedFp8Whole
from .gptq import Gptq, GptqInt8, GptqInt8V2, GptqV2
from .modelopt import ModelOptFp8, ModelOptNvfp4
from .mxfp4 import Mxfp4
from .owner import Owner, one_of

__all__ = ["OWNERS", "Owner", "owner_of"]

OWNERS: dict[str, Owner] = {
    "mxfp4": Mxfp4(),
    "compressed-tensors": CompressedTensorsNvfp4(),
    "compressed-tensors-mxfp4": CompressedTensorsMxfp4(),
    "compressed-tensors-int4": CompressedTensorsInt4(),
    "compressed-tensors-fp8": CompressedTensorsFp8(),
    "compressed-tensors-int8": CompressedTensorsInt8(),
    "compressed-tensors-int8-words": CompressedTensorsInt8Words(),
    "modelopt": ModelOptNvfp4(),
    "modelopt-fp8": ModelOptFp8(),
    "gptq": Gptq(),
    "gptq-v2": GptqV2(),
    "gptq-int8": GptqInt8(),
    "gptq-v2-int8": GptqInt8V2(),
    "awq": Awq(),
    "fp8": FineGrainedFp8(),
    "fp8-whole": FineGrainedFp8Whole(),
}
"""All formats."""


def owner_of(config: Mapping[str, Any]) -> Owner | None:
    """The owner of a `quantization_config`; None if it is not one of them. Raises ValueError for a variant of
    the owner's that cannot be read."""
    method = config.get("quant_method")
    method = getattr(method, "value", method)  # of an enum, in objects of transformers
    same = [owner for owner in OWNERS.values() if owner.method == method]
    for owner in same:
        if not owner.variant_key or owner.variant_of(config) in owner.variants:
            owner.check(config)
            return owner
    if same:
        known = [variant for owner in same for variant in owner.variants]
        got = same[0].variant_of(config)
        mixed = "; layers in several formats are not loaded" if "mixed" in str(got).lower() else ""
        raise ValueError(f"{same[0].variant_key}: expected {one_of(known)} of {method}, got {got!r}{mixed}")
    return None
