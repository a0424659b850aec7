"""Which part of a parameter this process holds, and collectives over errors, objects and packed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.packed_state import PackedState
from ..weight import PackedWeight
from .checks import is_dtensor, is_sharded
from .fsdp_tensor import NF4Shard
from .local_rows import LocalRows
from .partition import Partition


def mesh_of(model: nn.Module) -> Any:
    """The mesh of a model's sharded parameters, or None."""
    parameters: Any = model.parameters()
    return next((p.device_mesh for p in parameters if is_dtensor(p)), None)


def device_for(mesh: Any, device: torch.device | str | None) -> torch.device:
    """The device for new parameters: the given one, or this process's device of the mesh."""
    kind = "cpu" if mesh is None else mesh.device_type
    if device is None and kind != "cpu":
        return torch.device(kind, torch.accelerator.current_device_index())
    return torch.device(device or kind)


def raise_everywhere(error: str | None, groups: list[Any], kind: type[Exception] = RuntimeError) -> None:
    """Raises in every process the error that one of them passes."""
    found = first_value(error, groups)
    if found is not None:
        raise kind(found)


def groups_of(mesh: Any) -> list[Any]:
    """Process groups of the mesh's dimensions: broadcasting in each in turn reaches the whole mesh."""
    return [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]


def first_value(value: Any, groups: list[Any]) -> Any:
    """The first process's value that is not None, in every process."""
    for group in groups:
        values: list[Any] = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
        value = next((v for v in values if v is not None), None)
    return value


def local_slices(place: Any) -> tuple[slice, ...]:
    """Slices of the parameter that this process holds; all of it unless it is a DTensor."""
    if not is_dtensor(place):
        return tuple(slice(0, size) for size in place.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
    parts = zip(sizes, offsets, place.shape, strict=True)
    return tuple(slice(min(begin, whole), min(begin, whole) + size) for size, begin, whole in parts)


def make_parameter(place: Any, value: Any, device: torch.device) -> nn.Parameter:
    """A parameter on `device` to replace the meta parameter `place`. `value`, LocalRows or a dense tensor, is
    the part that `local_slices` selects."""
    from torch.distributed.tensor import DTensor

    if is_sharded(place):
        empty = place._local_tensor
        part = empty._rows.map(lambda t: torch.zeros_like(t, device=device))
        part.load(value)
        local: Tensor = NF4Shard(part, empty.dtype, empty.shape)
    elif isinstance(place, PackedWeight):
        state = value.whole(value.divided, (value.absmax2, value.offset))
        local = PackedWeight(state.map(lambda t: t.to(device)), place.dtype)
    else:
        local = value.to(device)
    if is_dtensor(place):
        local = DTensor(local, place._spec, requires_grad=False)
    return nn.Parameter(local, requires_grad=place.requires_grad)


def broadcast(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, groups: list[Any], kind: str
) -> Tensor:
    """The first process's tensor in every process, on this process's device of type `kind`."""
    device = torch.device(kind)
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor = tensor.detach().to(device).contiguous()
    for group in groups:
        dist.broadcast(tensor, group=group, group_src=0)
    return tensor


Layout = tuple[tuple[int, ...], str, int, dict[str, tuple[tuple[int, ...], torch.dtype]]]
"""Shape, format and blocksize of a packed weight, and shapes and dtypes of its tensors."""


def layout_of(state: PackedState) -> Layout:
    part = LocalRows.of(state)
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in part.tensors().items()}
    return part.partition.shape, part.format, part.partition.blocksize, tensors


def broadcast_weight(
    weight: PackedWeight | None, layout: Layout, groups: list[Any], kind: str, name: str
) -> LocalRows:
    """The first process's packed weight, whole, in every process."""
    shape, format, blocksize, about = layout
    mine = {} if weight is None else LocalRows.of(weight._state).tensors()
    whole = {key: broadcast(mine.get(key), *one, groups, kind) for key, one in about.items()}
    partition = Partition(shape, blocksize, format)
    tensors = whole["packed"], whole["absmax"], whole.get("absmax2"), whole.get("offset")
    return LocalRows(partition, 0, partition.rows, *tensors, name)
