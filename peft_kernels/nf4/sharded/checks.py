"""Weights of layers that are DTensors: of NF4Shards, as `fully_shard` leaves them between two uses; or of
NF4Weights, as plans of transformers for tensor parallelism leave them."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..weight import NF4Weight
from .fsdp_tensor import NF4Shard
from .local_rows import Part

UNGATHERED = (
    "this process has some rows of it, as FSDP2 shards it, expected all: call the module that fully_shard "
    "was given, or unshard() it first"
)


def is_dtensor(weight: Any) -> bool:
    """Whether it is a DTensor. Imports nothing: where torch.distributed.tensor is not, there are none."""
    return isinstance(getattr(weight, "_local_tensor", None), Tensor)


def is_sharded(weight: Any) -> TypeGuard[Any]:
    """Whether it is a DTensor whose part here is one of an NF4Weight."""
    return isinstance(getattr(weight, "_local_tensor", None), NF4Shard)


def is_parallel(weight: Any) -> TypeGuard[Any]:
    """Whether it is a DTensor whose part here is an NF4Weight of its own: rows or columns of the whole."""
    return isinstance(getattr(weight, "_local_tensor", None), NF4Weight)


def load_rows(weight: Any, whole: NF4Weight, device: torch.device | None = None) -> None:
    """Load its rows of a packed weight into a sharded one; on `device`, where it is on the meta device."""
    shard: NF4Shard = weight._local_tensor
    part = shard._part
    if device is not None:
        part = part.map(lambda t: torch.zeros_like(t, device=device))
        weight._local_tensor = NF4Shard(part, shard.dtype, shard.shape)
    source = Part.of(whole._state)
    with torch.no_grad():
        part.load(source.narrow(part.start, part.stop))
