"""What one of several processes has of a parameter, and what they agree on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..weight import NF4Weight
from .checks import is_dtensor, is_sharded
from .fsdp_tensor import NF4Shard
from .local_rows import Part
from .partition import Cut


def mesh_of(model: nn.Module) -> Any:
    """The mesh that a model's parameters are sharded on; None: they are not."""
    parameters: Any = model.parameters()
    return next((p.device_mesh for p in parameters if is_dtensor(p)), None)


def device_for(mesh: Any, device: torch.device | str | None) -> torch.device:
    """Where parameters are made: on a device that is given, else on this process's one of the mesh's."""
    kind = "cpu" if mesh is None else mesh.device_type
    if device is None and kind != "cpu":
        return torch.device(kind, torch.accelerator.current_device_index())
    return torch.device(device or kind)


def agree(error: str | None, groups: list[Any], kind: type[Exception] = RuntimeError) -> None:
    """Raise in every process what has gone wrong in one."""
    found = first(error, groups)
    if found is not None:
        raise kind(found)


def groups_of(mesh: Any) -> list[Any]:
    """Groups in which what one process sends to each in turn comes to all of a mesh."""
    return [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]


def first(value: Any, groups: list[Any]) -> Any:
    """What the first process that has anything has, in every process."""
    for group in groups:
        values: list[Any] = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
        value = next((v for v in values if v is not None), None)
    return value


def own(place: Any) -> tuple[slice, ...]:
    """What this process has of a parameter: of one that is no DTensor all."""
    if not is_dtensor(place):
        return tuple(slice(0, size) for size in place.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
    parts = zip(sizes, offsets, place.shape, strict=True)
    return tuple(slice(min(begin, whole), min(begin, whole) + size) for size, begin, whole in parts)


def parameter(place: Any, value: Any, device: torch.device) -> nn.Parameter:
    """A parameter on `device` that replaces the meta parameter `place`. `value`, a Part or dense values, is
    what `own` selects."""
    from torch.distributed.tensor import DTensor

    if is_sharded(place):
        empty = place._local_tensor
        part = empty._part.map(lambda t: torch.zeros_like(t, device=device))
        part.load(value)
        local: Tensor = NF4Shard(part, empty.dtype, empty.shape)
    elif isinstance(place, NF4Weight):
        state = value.whole((value.packed, value.absmax), (value.absmax2, value.offset))
        local = NF4Weight(state.map(lambda t: t.to(device)), place.dtype)
    else:
        local = value.to(device)
    if is_dtensor(place):
        local = DTensor(local, place._spec, requires_grad=False)
    return nn.Parameter(local, requires_grad=place.requires_grad)


def broadcast(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, groups: list[Any], kind: str
) -> Tensor:
    """What the first process has, in every process, on a device of `kind`, by which they send."""
    device = torch.device(kind)
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor = tensor.detach().to(device).contiguous()
    for group in groups:
        dist.broadcast(tensor, group=group, group_src=0)
    return tensor


Form = tuple[tuple[int, ...], int, dict[str, tuple[tuple[int, ...], torch.dtype]]]
"""Of a packed weight: shape, blocksize, and shapes and types of its tensors."""


def form_of(weight: NF4Weight) -> Form:
    part = Part.of(weight._state)
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in part.tensors().items()}
    return part.cut.shape, part.cut.blocksize, tensors


def sent(weight: NF4Weight | None, form: Form, groups: list[Any], kind: str, name: str) -> Part:
    """A packed weight of the first process, whole, in every process."""
    shape, blocksize, tensors = form
    mine = {} if weight is None else Part.of(weight._state).tensors()
    whole = {key: broadcast(mine.get(key), *about, groups, kind) for key, about in tensors.items()}
    cut = Cut(shape, blocksize)
    return Part(
        cut, 0, cut.rows, whole["packed"], whole["absmax"], whole.get("absmax2"), whole.get("offset"), name
    )
