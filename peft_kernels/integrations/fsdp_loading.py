"""A checkpoint into a model that is sharded on the meta device: each process reads its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.checks import holds_experts, nf4_weights
from ..checkpoints.folder import Checkpoint
from ..checkpoints.header import CheckpointError, Entry
from ..checkpoints.rows import read_form, read_part, read_rows
from ..nf4.model import ModelLink, announce
from ..nf4.shard import NF4Shard
from ..nf4.sharded_weight import is_dtensor, is_sharded
from ..nf4.weight import NF4Weight
from ..nn import NF4Linear
from ..quantize_report import QuantizeReport, nbytes_of
from .architectures import is_linear

META = torch.device("meta")


def empty_layers(model: nn.Module, path: Path | str, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Put NF4Linear, on the meta device, where a checkpoint has NF4 weights.

    Parameters
    ----------
    model : nn.Module
        On the meta device, its parameters at least (`accelerate.init_empty_weights()`). Changed in place,
        and returned.
    path : path
        A .safetensors file or a folder of them; only headers and what describes the weights is read.
    compute_dtype : torch.dtype, optional
        Of every layer, see `nn.NF4Linear`.

    Raises
    ------
    CheckpointError
        (a ValueError) The checkpoint is damaged, holds packed experts, or has an NF4 weight where the model
        has no linear layer of its shape.
    """
    checkpoint = Checkpoint.open(path)
    found: dict[str, NF4Linear] = {}
    link, report = ModelLink(), QuantizeReport(bytes_before=nbytes_of(model))
    for weight, names in nf4_weights(checkpoint.entries).items():
        if holds_experts(names):
            raise CheckpointError(f"{weight}: expected the weight of a linear layer, got packed experts")
        state, dtype = read_form(checkpoint, weight, names)
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
        empty = NF4Weight(state.map(lambda t: t.to(META)), dtype)
        layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        layer.link = link
        found[name] = layer
    for name, layer in found.items():
        model.set_submodule(name, layer)
    if found:
        report.layers, report.bytes_after = list(found), nbytes_of(model)
        announce(model, link, report)
    return model


def load_checkpoint(
    model: nn.Module, path: Path | str, strict: bool = True, device: torch.device | str | None = None
) -> None:
    """Load a checkpoint into a sharded model, all of it or nothing. Every process has to call it, and reads
    its own rows of each tensor.

    What is on the meta device is made: parameters that the checkpoint has, and the weights of new LoRA
    adapters, which start as PEFT starts them, alike in every process. A model of PEFT is loaded as the model
    that it is made from.

    Parameters
    ----------
    model : nn.Module
        After `fully_shard`; NF4 layers where the checkpoint has them (`empty_layers`).
    path : path
        A .safetensors file, or a folder of them with or without an index.
    strict : bool
        Whether the checkpoint must have all of the model's parameters, and the model all of its tensors.
    device : torch.device, optional
        Where parameters on the meta device are made; by default the mesh's device. "cpu" with
        `CPUOffloadPolicy`.

    Raises
    ------
    CheckpointError
        (a ValueError) In every process: what does not fit or cannot be read, in one of them, in a sentence
        that names the tensor.
    """
    mesh = mesh_of(model)
    kind = "cpu" if mesh is None else mesh.device_type
    if device is None:
        device = (
            torch.device(kind)
            if kind == "cpu"
            else torch.device(kind, torch.accelerator.current_device_index())
        )
    places, error, new = _places(model), None, dict[str, Any]()
    try:
        new = _read(Checkpoint.open(path), places, strict)
    except (CheckpointError, OSError) as problem:
        error = str(problem)
    agree(error, mesh, CheckpointError)
    holders = _holders(model)
    made: dict[int, nn.Parameter] = {}
    for name, value in new.items():
        place = places[name]
        if id(place) in made:
            continue
        if place.is_meta:
            made[id(place)] = parameter = _parameter(place, value, torch.device(device))
            for module, attribute in holders[id(place)]:
                module._parameters[attribute] = parameter
        else:
            _fill(place, value)
    _start_adapters(model, mesh, torch.device(device))
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left and strict:
        raise CheckpointError(f"{left[0]}: the checkpoint has no tensor of this name, the model has")


def mesh_of(model: nn.Module) -> Any:
    """The mesh that a model's parameters are sharded on; None: they are not."""
    parameters: Any = model.parameters()
    return next((p.device_mesh for p in parameters if is_dtensor(p)), None)


def agree(error: str | None, mesh: Any, kind: type[Exception] = RuntimeError) -> None:
    """Raise in every process of a mesh what has gone wrong in one."""
    found = _first(error, mesh)
    if found is not None:
        raise kind(found)


def _first(value: Any, mesh: Any) -> Any:
    """What the first process that has anything has, in every process."""
    for dim in range(0 if mesh is None else mesh.ndim):
        group = mesh.get_group(dim)
        values: list[Any] = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
        value = next((v for v in values if v is not None), None)
    return value


def _places(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by the names that a checkpoint has, adapters left out."""
    found: dict[str, Any] = {}
    peft = hasattr(model, "peft_config")
    named = [*model.named_parameters(remove_duplicate=False)]
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                named.append((f"{prefix}.{name}" if prefix else name, buffer))
    for name, place in named:
        if peft:
            if ".lora_" in name:
                continue
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        found[name] = place
    return found


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((module, attribute))
    return found


def _read(checkpoint: Checkpoint, places: dict[str, Any], strict: bool) -> dict[str, Any]:
    """What this process has of each tensor: a Part, or dense values."""
    quantised = nf4_weights(checkpoint.entries)
    items = {item for names in quantised.values() for item in names}
    names = {*quantised, *(checkpoint.entries.keys() - items)}
    loaded = {id(places[name]) for name in names if name in places}
    for name, place in places.items():
        if strict and id(place) not in loaded:
            raise CheckpointError(f"{name}: the checkpoint has no tensor of this name, the model has")
    new: dict[str, Any] = {}
    for name in sorted(names):
        if name not in places:
            if strict:
                raise CheckpointError(f"{name}: the model has no tensor of this name, the checkpoint has")
            continue
        place = places[name]
        packed = is_sharded(place) or isinstance(place, NF4Weight)
        if packed != (name in quantised):
            expected, got = (
                ("an NF4 weight", "a plain tensor") if packed else ("a plain tensor", "an NF4 weight")
            )
            raise CheckpointError(f"{name}: expected {expected}, got {got}")
        if packed:
            state, _ = read_form(checkpoint, name, quantised[name])
            _check(name, "shape", tuple(place.shape), state.shape)
            mine = place._local_tensor._part if is_sharded(place) else None
            start, stop = (0, state.shape[0]) if mine is None else (mine.start, mine.stop)
            part = read_part(checkpoint, name, state, start, stop)
            if mine is not None:
                _check(name, "blocksize", mine.cut.blocksize, part.cut.blocksize)
                _check(name, "double_quant", mine.absmax2 is not None, part.absmax2 is not None)
            new[name] = part
        else:
            new[name] = _dense_rows(name, place, checkpoint.entries[name])
    return new


def _check(name: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise CheckpointError(f"{name}: expected {what} {expected}, got {got}")


def _dense_rows(name: str, place: Any, entry: Entry) -> Tensor:
    _check(name, "shape", tuple(place.shape), entry.shape)
    if entry.dtype != place.dtype and not (entry.dtype.is_floating_point and place.dtype.is_floating_point):
        raise CheckpointError(f"{name}: expected dtype {place.dtype}, got {entry.dtype}")
    if not is_dtensor(place):
        return entry.read().to(place.dtype)
    rows, *others = _own(place)
    found = read_rows(entry, rows.start, rows.stop) if place.dim() else entry.read()
    return found[(slice(None), *others)].to(place.dtype).contiguous()


def _own(place: Any) -> tuple[slice, ...]:
    """What this process has of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
    own = zip(sizes, offsets, place.shape, strict=True)
    return tuple(slice(min(begin, whole), min(begin, whole) + size) for size, begin, whole in own)


def _parameter(place: Any, value: Any, device: torch.device) -> nn.Parameter:
    """On `device`, in place of one on the meta device."""
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


@torch.no_grad()
def _fill(place: Any, value: Any) -> None:
    if is_sharded(place):
        place._local_tensor._part.load(value)
    elif isinstance(place, NF4Weight):
        state = value.whole((value.packed, value.absmax), (value.absmax2, value.offset))
        state.name = place._state.name
        place.data = NF4Weight(state, place.dtype).to(place.device)
    else:
        (place.to_local() if is_dtensor(place) else place).copy_(value)


def _start_adapters(model: Any, mesh: Any, device: torch.device) -> None:
    """Make LoRA adapters that are on the meta device as PEFT makes them: whole, from one seed, of which each
    process keeps its rows."""
    if "peft" not in sys.modules or not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    seed = _first(int(torch.randint(1 << 62, ())), mesh)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in layers:
            for adapter in layer.lora_A:
                linears = [layer.lora_A[adapter], layer.lora_B[adapter]]
                if not all(p.is_meta for linear in linears for p in linear.parameters()):
                    continue
                init = model.peft_config[adapter].init_lora_weights
                if init not in (True, False, "gaussian"):
                    raise ValueError(
                        "init_lora_weights: expected True, False or 'gaussian' for adapters on the meta "
                        f"device, got {init!r}"
                    )
                places = [(linear, name, p) for linear in linears for name, p in linear.named_parameters()]
                for linear, name, p in places:
                    whole = torch.zeros(p.shape, dtype=p.dtype)
                    linear._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)
                layer.reset_lora_parameters(adapter, init)
                for linear, name, p in places:
                    made: Any = linear._parameters[name]
                    own = made.detach()[_own(p)].clone() if is_dtensor(p) else made.detach()
                    linear._parameters[name] = _parameter(p, own, device)
