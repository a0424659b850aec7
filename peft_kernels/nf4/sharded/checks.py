"""Checks of layer weights that are DTensors: of NF4Shards (`fully_shard`, while not gathered), or of
PackedWeights (tensor parallelism of transformers)."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..weight import PackedWeight
from .fsdp_tensor import NF4Shard
from .local_rows import LocalRows

UNGATHERED = (
    "this process has some rows of it, as FSDP2 shards it, expected all; call the module that fully_shard "
    "was given, or unshard() it first"
)


def is_dtensor(weight: Any) -> bool:
    """Whether `weight` is a DTensor. Does not import torch.distributed.tensor, which may be missing."""
    return isinstance(getattr(weight, "_local_tensor", None), Tensor)


def is_sharded(weight: Any) -> TypeGuard[Any]:
    """Whether `weight` is a DTensor whose local tensor is an NF4Shard."""
    return isinstance(getattr(weight, "_local_tensor", None), NF4Shard)


def is_tensor_parallel(weight: Any) -> TypeGuard[Any]:
    """Whether `weight` is a DTensor whose local tensor, some rows or columns of it, is a PackedWeight."""
    return isinstance(getattr(weight, "_local_tensor", None), PackedWeight)


def load_rows(weight: Any, whole: PackedWeight, device: torch.device | None = None) -> None:
    """Loads this process's rows of `whole` into a sharded weight, which is first made on `device` if
    given."""
    shard: NF4Shard = weight._local_tensor
    part = shard._rows
    if device is not None:
        part = part.map(lambda t: torch.zeros_like(t, device=device))
        weight._local_tensor = NF4Shard(part, shard.dtype, shard.shape)
    source = LocalRows.of(whole._state)
    with torch.no_grad():
        part.load(source.narrow(part.start, part.stop))
