"""Reports and checkpoints for NF4 models under FSDP2 (`torch.distributed.fsdp.fully_shard`).

Sharding itself needs none of this: `fully_shard` works on `PackedWeight` and `NF4Shard`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.packed_state import PARALLEL
from ...nf4.sharded.checks import is_dtensor, is_sharded, is_tensor_parallel
from ...nf4.sharded.fsdp_tensor import NF4Shard
from ...nf4.sharded.local_rows import LocalRows
from ...nf4.sharded.ranks import groups_of, mesh_of, raise_everywhere
from ...nf4.weight import PackedWeight
from .broadcast import load_full_state_dict
from .loading import empty_layers, load_checkpoint

__all__ = [
    "ShardingReport",
    "checkpoint_state",
    "empty_layers",
    "full_state_dict",
    "load_checkpoint",
    "load_full_state_dict",
    "report",
    "save_adapter",
]


@dataclass
class ShardingReport:
    """Which packed weights of a model are sharded. `print(report)` summarises it."""

    sharded: list[str] = field(default_factory=list)
    """Names of sharded weights."""
    replicated: list[str] = field(default_factory=list)
    """Names of replicated weights: in `ignored_params`, or not given to fully_shard."""
    joined: list[str] = field(default_factory=list)
    """Names of sharded weights that are copied when gathered, because a shard boundary is inside a block."""
    bytes_here: int = 0
    """Bytes of all packed weights in this process."""
    bytes_whole: int = 0

    def __str__(self) -> str:
        lines = [
            f"peft_kernels: {len(self.sharded)} packed weights sharded, {len(self.replicated)} replicated: "
            f"{self.bytes_here / 1e6:.3g} of {self.bytes_whole / 1e6:.3g} MB in this process"
        ]
        for names, what in (
            (self.joined, "sharded inside a block, copied when gathered"),
            (self.replicated, "whole in each process (ignored_params, or not given to fully_shard)"),
        ):
            if names:
                lines.append(f"{what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        return "\n".join(lines)


def report(model: nn.Module) -> ShardingReport:
    """Which packed weights of a model are currently sharded."""
    found = ShardingReport()
    for name, p in model.named_parameters():
        weight: Any = p
        if is_sharded(weight):
            part = weight._local_tensor._rows
            found.sharded.append(name)
            found.bytes_here += part.nbytes
            found.bytes_whole += part.whole_nbytes
            if not part.partition.is_cell_aligned(part.partition.rows_per_rank(_shards(weight))):
                found.joined.append(name)
        elif isinstance(weight, PackedWeight):
            found.replicated.append(name)
            found.bytes_here += weight.nbytes
            found.bytes_whole += weight.nbytes
    return found


def _shards(weight: Any) -> int:
    sizes = zip(weight.placements, weight.device_mesh.shape, strict=True)
    return prod(size for placement, size in sizes if placement.is_shard())


def checkpoint_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name for `torch.distributed.checkpoint`, which saves them, and loads them in
    place into a model in any number of processes, sharded or not.

    Each NF4 weight is one entry of packed bytes. `get_model_state_dict` gives the same for a sharded model,
    but does not know the keys of NF4 weights in an unsharded one."""
    _refuse_parallel(model)
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        value: Any = p.detach()
        if isinstance(value, PackedWeight) and not value.is_dense:
            value = NF4Shard(LocalRows.of(value._state), value.dtype)
        found[name] = value
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gathers the model's whole state dict on the CPU of process 0; empty in other processes. Every process
    must call it.

    NF4 weights are in bitsandbytes' format, as in an ordinary checkpoint: a model in one process loads it by
    `load_state_dict`.
    """
    _refuse_parallel(model)
    mesh = mesh_of(model)
    found: dict[str, Tensor] = {}
    first = _is_first(mesh)
    for key, value in model.state_dict().items():
        whole = _whole(value)
        if not first:
            continue
        if isinstance(whole, PackedWeight):
            prefix, dot, name = key.rpartition(".")
            found |= {k: t.cpu() for k, t in whole.state_dict(prefix + dot, name).items()}
        else:
            found[key] = whole.detach().cpu()
    return found


def save_adapter(model: Any, folder: Path | str, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)` of a PEFT model with sharded parameters: an ordinary PEFT
    folder, written by process 0. Every process must call it. Gathers only the adapter.

    Raises
    ------
    RuntimeError
        In every process, if process 0 cannot write it, or weights are split for tensor parallelism.
    """
    from peft import get_peft_model_state_dict

    _refuse_parallel(model)
    mesh = mesh_of(model)
    state = model.state_dict()
    wanted = set()
    for adapter in options.get("selected_adapters") or list(model.peft_config):
        wanted |= {id(v) for v in get_peft_model_state_dict(model, state, adapter).values()}
    full = {key: _whole(value) if id(value) in wanted else value for key, value in state.items()}
    error = None
    if _is_first(mesh):
        try:
            model.save_pretrained(folder, state_dict=full, **options)
        except Exception as problem:
            error = f"{folder}: the adapter could not be saved ({type(problem).__name__}: {problem})"
    raise_everywhere(error, groups_of(mesh))


def _refuse_parallel(model: nn.Module) -> None:
    """Raises RuntimeError for tensor parallelism, in every process before any collective."""
    for name, p in model.named_parameters():
        if is_tensor_parallel(p):
            raise RuntimeError(f"{name}: {PARALLEL}, expected model.save_pretrained(folder) in every process")


def _whole(value: Any) -> Any:
    if not is_dtensor(value):
        return value
    with torch.no_grad():
        whole: Any = value.to(value.device_mesh.device_type).full_tensor()
    if isinstance(whole, NF4Shard):  # on a single process, where nothing was gathered
        rows = whole._rows
        state = rows.whole(rows.gather_outputs(1, rows.divided), (rows.absmax2, rows.offset))
        whole = PackedWeight(state, whole.dtype)
    return whole


def _is_first(mesh: Any) -> bool:
    return dist.get_rank() == (0 if mesh is None else int(mesh.mesh.flatten()[0]))
