"""Loads a whole state dict of process 0 into a model of several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...checkpoints.checks import nf4_weights
from ...checkpoints.header import CheckpointError
from ...nf4.sharded.checks import is_sharded
from ...nf4.sharded.ranks import (
    broadcast,
    broadcast_weight,
    device_for,
    first_value,
    groups_of,
    layout_of,
    local_slices,
    mesh_of,
    raise_everywhere,
)
from ...nf4.weight import PackedWeight
from . import adapters
from .loading import (
    assign_tensors,
    base_places,
    check_dense,
    check_layout,
    expects_packed,
    named_places,
    names_to_load,
)


def load_full_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any] | None,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> None:
    """Loads a whole state dict of process 0 into a sharded model, completely or not at all. Every process
    must call it; `state_dict` is ignored in other processes.

    Like `torch.distributed.checkpoint.state_dict.set_model_state_dict` with `full_state_dict` and
    `broadcast_from_rank0`, but sends NF4 weights and experts packed, one at a time.

    Parameters
    ----------
    model : nn.Module
        Sharded by `fully_shard` or not. Tensors on the meta device are created, and new adapters there are
        initialised as in `load_checkpoint`.
    state_dict : mapping, optional
        With the names of `model` or of the base of a PEFT model: from `model.state_dict()` in one process,
        `full_state_dict`, a safetensors file, or torch's `get_model_state_dict(full_state_dict=True)`.
    strict : bool
        Require the same set of tensors in state dict and model.
    device : torch.device, optional
        Device for parameters on the meta device; by default the mesh's.

    Raises
    ------
    CheckpointError
        (a ValueError) In every process, before anything is sent: a tensor does not fit.
    """
    mesh = mesh_of(model)
    groups, kind = groups_of(mesh), "cpu" if mesh is None else mesh.device_type
    if mesh is None and dist.is_initialized():
        groups, kind = [dist.group.WORLD], str(dist.distributed_c10d._get_pg_default_device())
    places = base_places(model) | named_places(model)
    error, mine, plan = None, dict[str, Any](), dict[str, Any]()
    try:
        if all(group.rank() == 0 for group in groups):
            mine = _values(state_dict or {})
            plan = {name: _about(value) for name, value in mine.items()}
    except Exception as problem:  # any error, because other processes wait
        error = str(problem)
    raise_everywhere(error, groups, CheckpointError)
    plan = first_value(plan or None, groups) or {}
    try:
        names = _names_to_load(model, places, plan, strict)
    except CheckpointError as problem:
        error = str(problem)
    raise_everywhere(error, groups, CheckpointError)
    new: dict[str, Any] = {}
    for name in names:
        place = places[name]
        if isinstance(plan[name][0], torch.dtype):
            dtype, shape = plan[name]
            whole = broadcast(mine.get(name), shape, dtype, groups, kind)
            new[name] = whole[local_slices(place)].to(place.dtype).clone()
        else:
            part = broadcast_weight(mine.get(name), plan[name], groups, kind, name)
            rows = place._local_tensor._rows if is_sharded(place) else part
            new[name] = part.narrow(rows.start, rows.stop).with_own_memory()
    assign_tensors(model, places, new, device_for(mesh, device))
    if adapters.is_peft(model):
        adapters.initialise(model, mesh, device_for(mesh, device))


def _values(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, with packed weights assembled. Raises ValueError for one that does not fit."""
    quantised = nf4_weights(state_dict)
    items = {item for names in quantised.values() for item in names}
    found = {name: value for name, value in state_dict.items() if name not in items}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.is_meta:
            got = "one on the meta device" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{name}: expected a tensor, got {got}")
        if isinstance(value, PackedWeight) and value.is_dense:
            found[name] = value.dequantize()
    for name, mine in quantised.items():
        found[name] = PackedWeight.from_state_dict({item: state_dict[item] for item in mine}, name=name)
    return found


def _about(value: Tensor) -> Any:
    return layout_of(value._state) if isinstance(value, PackedWeight) else (value.dtype, tuple(value.shape))


def _names_to_load(model: nn.Module, places: dict[str, Any], plan: dict[str, Any], strict: bool) -> list[str]:
    """Names to load. Raises CheckpointError if a tensor does not fit, is missing, or cannot be
    initialised."""
    loaded = {id(places[name]) for name in plan if name in places}
    wanted = dict(places)
    if adapters.is_peft(model):
        started = {id(tensors[key]): tensors[key] for tensors, key in adapters.initialisable(model)}
        new = {key for key, tensor in started.items() if tensor.is_meta and key not in loaded}
        if new and (reason := adapters.unsupported_reason(model)):
            raise CheckpointError(reason)
        wanted = {name: place for name, place in places.items() if id(place) not in new}
    names = names_to_load(plan, wanted, strict, "the state dict of process 0")
    for name in names:
        form = plan[name]
        if expects_packed(name, places[name], not isinstance(form[0], torch.dtype)):
            check_layout(name, places[name], form)
        else:
            check_dense(name, places[name], form[1], form[0])
    return names
