"""Loads a checkpoint into a sharded model; each process reads only its rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.checks import holds_experts, nf4_weights
from ...checkpoints.folder import Checkpoint
from ...checkpoints.header import CheckpointError, Entry
from ...checkpoints.rows import read_layout, read_local_rows, read_rows
from ...nf4.model import ModelLink, mark_quantized
from ...nf4.sharded.checks import is_dtensor, is_sharded
from ...nf4.sharded.ranks import (
    Layout,
    device_for,
    groups_of,
    layout_of,
    local_slices,
    make_parameter,
    mesh_of,
    raise_everywhere,
)
from ...nf4.weight import PackedWeight
from ...nn import NF4Linear
from ...quantize.architectures import is_linear
from ...quantize.report import QuantizeReport, nbytes_of
from . import adapters

META = torch.device("meta")


def empty_layers(model: nn.Module, path: Path | str, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Puts NF4Linear layers on the meta device where a checkpoint has NF4 weights.

    Parameters
    ----------
    model : nn.Module
        With parameters on the meta device (`accelerate.init_empty_weights()`). Changed in place and returned.
    path : path
        A .safetensors file or a folder of them; only headers and descriptions of weights are read.
    compute_dtype : torch.dtype, optional
        See `nn.NF4Linear`.

    Raises
    ------
    CheckpointError
        (a ValueError) The checkpoint is damaged, has packed experts, or an NF4 weight without a matching
        linear layer.
    """
    checkpoint = Checkpoint.open(path)
    found: dict[str, NF4Linear] = {}
    link, report = ModelLink(), QuantizeReport(bytes_before=nbytes_of(model))
    for weight, names in nf4_weights(checkpoint.entries).items():
        if holds_experts(names):
            raise CheckpointError(f"{weight}: expected the weight of a linear layer, got packed experts")
        state, dtype = read_layout(checkpoint, weight, names)
        name = weight.removesuffix(".weight")
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            linear = None
        shape = getattr(getattr(linear, "weight", None), "shape", None)
        if linear is None or not (is_linear(linear) or isinstance(linear, nn.Linear)):
            raise CheckpointError(f"{weight}: expected a linear layer of this name in the model, got none")
        layer = NF4Linear.awaiting(linear, compute_dtype)
        if tuple(layer.weight.shape) != state.shape:
            raise CheckpointError(f"{weight}: expected shape {tuple(shape or ())}, got {state.shape}")
        empty = PackedWeight(state.map(lambda t: t.to(META)), dtype)
        layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        layer.link = link
        found[name] = layer
    for name, layer in found.items():
        model.set_submodule(name, layer)
    if found:
        report.layers, report.bytes_after = list(found), nbytes_of(model)
        mark_quantized(model, link, report)
    return model


def load_checkpoint(
    model: nn.Module, path: Path | str, strict: bool = True, device: torch.device | str | None = None
) -> None:
    """Loads a checkpoint into a sharded model, completely or not at all. Every process must call it, and
    reads its own rows.

    Tensors on the meta device are created: those of the checkpoint, and those of new adapters (LoRA, DoRA,
    modules_to_save, trainable_token_indices), which are initialised like PEFT does, equally in every process.
    A PEFT model is loaded with the names of its base.

    Parameters
    ----------
    model : nn.Module
        After `fully_shard`; NF4 layers where the checkpoint has them (`empty_layers`).
    path : path
        A .safetensors file, or a folder of them with or without an index.
    strict : bool
        Require the same set of tensors in checkpoint and model.
    device : torch.device, optional
        Device for parameters on the meta device; by default the mesh's. "cpu" with `CPUOffloadPolicy`.

    Raises
    ------
    CheckpointError
        (a ValueError) In every process, if in one of them a tensor does not fit or cannot be read, or an
        adapter cannot be initialised on the meta device.
    """
    mesh = mesh_of(model)
    device = device_for(mesh, device)
    places, error, new = base_places(model), None, dict[str, Any]()
    adapted = adapters.is_peft(model)
    try:
        if adapted and (reason := adapters.unsupported_reason(model)):
            raise CheckpointError(reason)
        if strict and (name := _unfilled_buffer(model, places)):
            raise CheckpointError(
                f"{name}: expected values, got a buffer on the meta device that no checkpoint has: build the "
                "model with init_empty_weights(include_buffers=False)"
            )
        new = _read(Checkpoint.open(path), places, strict)
    except (CheckpointError, OSError) as problem:
        error = str(problem)
    raise_everywhere(error, groups_of(mesh), CheckpointError)
    assign_tensors(model, places, new, device)
    if adapted:
        adapters.initialise(model, mesh, device)


def assign_tensors(
    model: nn.Module, places: dict[str, Any], new: dict[str, Any], device: torch.device
) -> None:
    """Writes this process's part of each tensor to its place, creating meta tensors on `device`."""
    holders = _holders(model)
    made: dict[int, Any] = {}
    for name, value in new.items():
        place = places[name]
        if id(place) in made:
            continue
        if place.is_meta:
            filled: Any = make_parameter(place, value, device)
            made[id(place)] = filled = filled if isinstance(place, nn.Parameter) else filled.detach()
            for tensors, key in holders[id(place)]:
                tensors[key] = filled
        else:
            _fill(place, value)


def named_places(model: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers by name."""
    named = dict[str, Any](model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = buffer
    return named


def base_places(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers of the base, without adapters, by names in its checkpoint."""
    named = named_places(model)
    if not adapters.is_peft(model):
        return named
    prefixes, base_name = adapters.prefixes(model), adapters.base_names(model)
    return {base_name(name): place for name, place in named.items() if not name.startswith(prefixes)}


def _unfilled_buffer(model: nn.Module, places: dict[str, Any]) -> str | None:
    """Name of a meta buffer that nothing fills, or None."""
    filled = {id(place) for place in places.values()}
    if adapters.is_peft(model):
        filled |= {id(tensors[key]) for tensors, key in adapters.initialisable(model)}
    return next((name for name, b in model.named_buffers() if b.is_meta and id(b) not in filled), None)


def _holders(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Places of parameters and buffers, by id."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((tensors, key))
    return found


def _read(checkpoint: Checkpoint, places: dict[str, Any], strict: bool) -> dict[str, Any]:
    """This process's part of each tensor: LocalRows or dense values."""
    quantised = nf4_weights(checkpoint.entries)
    items = {item for names in quantised.values() for item in names}
    names = {*quantised, *(checkpoint.entries.keys() - items)}
    new: dict[str, Any] = {}
    for name in names_to_load(names, places, strict):
        place = places[name]
        if not expects_packed(name, place, name in quantised):
            new[name] = _dense_rows(name, place, checkpoint.entries[name])
            continue
        state, _ = read_layout(checkpoint, name, quantised[name])
        check_layout(name, place, layout_of(state))
        mine = place._local_tensor._rows if is_sharded(place) else None
        start, stop = (0, state.shape[0]) if mine is None else (mine.start, mine.stop)
        new[name] = read_local_rows(checkpoint, name, state, start, stop)
    return new


def names_to_load(
    names: Iterable[str], places: dict[str, Any], strict: bool, whose: str = "the checkpoint"
) -> list[str]:
    """Names to load. With `strict`, raises CheckpointError unless model and checkpoint have the same."""
    names = sorted(names)
    loaded = {id(places[name]) for name in names if name in places}
    for name, place in places.items():
        if strict and id(place) not in loaded:
            raise CheckpointError(f"{name}: {whose} has no tensor of this name, the model has")
    for name in names:
        if strict and name not in places:
            raise CheckpointError(f"{name}: the model has no tensor of this name, {whose} has")
    return [name for name in names if name in places]


def expects_packed(name: str, place: Any, packed: bool) -> bool:
    """Whether a place is for an NF4 weight. Raises CheckpointError if that differs from `packed`."""
    if packed != (is_sharded(place) or isinstance(place, PackedWeight)):
        expected, got = "an NF4 weight", "a plain tensor"
        expected, got = (got, expected) if packed else (expected, got)
        raise CheckpointError(f"{name}: expected {expected}, got {got}")
    return packed


def check_layout(name: str, place: Any, layout: Layout) -> None:
    """Raises CheckpointError if a packed weight does not match the layout of its place."""
    shape, format, blocksize, tensors = layout
    _check(name, "shape", tuple(place.shape), tuple(shape))
    if is_sharded(place):
        mine = place._local_tensor._rows
        _check(name, "format", mine.format, format)
        _check(name, "blocksize", mine.partition.blocksize, blocksize)
        _check(name, "double_quant", mine.offset is not None, "offset" in tensors)


def check_dense(name: str, place: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises CheckpointError if a plain tensor does not fit its place."""
    _check(name, "shape", tuple(place.shape), tuple(shape))
    if dtype != place.dtype and not (dtype.is_floating_point and place.dtype.is_floating_point):
        raise CheckpointError(f"{name}: expected dtype {place.dtype}, got {dtype}")


def _check(name: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise CheckpointError(f"{name}: expected {what} {expected}, got {got}")


def _dense_rows(name: str, place: Any, entry: Entry) -> Tensor:
    check_dense(name, place, entry.shape, entry.dtype)
    if not is_dtensor(place):
        return entry.read().to(place.dtype)
    rows, *others = local_slices(place)
    found = read_rows(entry, rows.start, rows.stop) if place.dim() else entry.read()
    return found[(slice(None), *others)].to(place.dtype).contiguous()


@torch.no_grad()
def _fill(place: Any, value: Any) -> None:
    if is_sharded(place):
        place._local_tensor._rows.load(value)
    elif isinstance(place, PackedWeight):
        state = value.whole(value.divided, (value.absmax2, value.offset))
        state.name = place._state.name
        place.data = PackedWeight(state, place.dtype).to(place.device)
    else:
        (place.to_local() if is_dtensor(place) else place).copy_(value)
