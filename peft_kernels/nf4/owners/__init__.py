"""Formats of 4-bit checkpoints that other libraries own, one a file.

A checkpoint's `quant_method` names its owner; the names of its tensors tell which weights are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .compressed_tensors import CompressedTensors
from .modelopt import ModelOpt
from .mxfp4 import Mxfp4
from .owner import Owner

__all__ = ["OWNERS", "Owner", "owner_of"]

OWNERS: dict[str, Owner] = {owner.method: owner for owner in (Mxfp4(), CompressedTensors(), ModelOpt())}
"""All owners, by `quant_method`."""


def owner_of(config: Mapping[str, Any]) -> Owner | None:
    """The owner of a `quantization_config`; None if it is not one of them. Raises ValueError for a variant of
    the owner's that cannot be read."""
    method = config.get("quant_method")
    method = getattr(method, "value", method)  # of an enum, in objects of transformers
    owner = OWNERS.get(method) if isinstance(method, str) else None
    if owner is not None:
        owner.check(config)
    return owner
