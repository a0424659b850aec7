"""DTensor parameters (FSDP2's `fully_shard`): a step sees the local shard, a checkpoint the whole."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .states import blocks_of, in_own_blocks, table_shape, to_table

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Any) -> TypeGuard[DTensor]:
    """Whether t is a DTensor. Does not import torch.distributed.tensor, which may be missing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def part_of(t: Any) -> Tensor:
    """The local shard of a DTensor, sharing memory; any other tensor itself."""
    if not is_sharded(t):
        found: Tensor = t
        return found
    with torch.no_grad():
        found = t.to_local()
    return found


def mesh_dims(t: DTensor) -> tuple[int, ...]:
    """Mesh dimensions along which t is not replicated."""
    return tuple(i for i, placement in enumerate(t.placements) if not placement.is_replicate())


class Layout:
    """How a DTensor parameter and its states are sharded.

    Moments are DTensors of the parameter's shape and placements. Blocks never cross shards. If shards are
    whole rows, absmax is a DTensor (`table_shape`) sharded like the parameter, which fits any number of
    shards. Otherwise its shape is (shards along each dimension of the parameter..., blocks of the largest
    shard), zero-padded, which fits only this number of shards.
    """

    def __init__(self, parameter: DTensor, what: str) -> None:
        self.mesh, self.placements = parameter.device_mesh, tuple(parameter.placements)
        self.shape = tuple(parameter.shape)
        self.part_shape = tuple(part_of(parameter).shape)
        self.what = what
        if any(placement.is_partial() for placement in self.placements):
            raise ValueError(
                f"{what}: expected a DTensor that is sharded or replicated, got {self.placements}"
            )
        # Pairs of (mesh dimension, parameter dimension) along which it is sharded.
        self._sharded_dims = [(i, self.placements[i].dim) for i in mesh_dims(parameter)]  # type: ignore[attr-defined]
        self._by_rows = all(
            dim == 0 and len(self._sharded_dims) == 1 and self.placements[i].is_shard()
            for i, dim in self._sharded_dims
        )

    @property
    def number(self) -> int:
        """Number of this process's shard, from 1; replicas share it."""
        at = self.mesh.get_coordinate() or [0] * self.mesh.ndim
        found = 0
        for i, _ in self._sharded_dims:
            found = found * self.mesh.size(i) + at[i]
        return 1 + found

    def _absmax_shape(self) -> tuple[int, ...]:
        if self._by_rows:
            return table_shape(self.shape)
        parts, largest = [1] * len(self.shape), list(self.shape)
        for i, dim in self._sharded_dims:
            parts[dim] *= self.mesh.size(i)
            largest[dim] = -(-largest[dim] // self.mesh.size(i))
        return *parts, blocks_of(largest)

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The shard's state as DTensors, for a checkpoint. Moments share memory."""
        found = dict(state)
        for name, value in state.items():
            if name.startswith("absmax"):
                shape = self._absmax_shape()
                if self._by_rows:
                    value = to_table(value, self.part_shape)
                else:
                    value = F.pad(value, (0, shape[-1] - value.numel())).view(*[1] * len(self.shape), -1)
                found[name] = self._dtensor(value, shape)
            elif name.startswith(("state", "compensation")):
                found[name] = self._dtensor(value, self.shape)
        return found

    def part(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The shard's state from a checkpoint of DTensors, or of whole tensors in every process. Raises
        ValueError for what does not fit."""
        found = dict(entry)
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                continue
            if name.startswith("absmax"):
                found[name] = self._absmax_part(name, value)
            elif name.startswith(("state", "compensation")):
                if tuple(value.shape) != self.shape:
                    got = tuple(value.shape)
                    raise ValueError(
                        f"{self.what}: {name}: expected shape {self.shape} like the parameter, got {got}"
                    )
                found[name] = self._shard(value)
            else:
                found[name] = whole_of(value)
        return in_own_blocks(found, self.part_shape, self.what) if self._by_rows else found

    def _absmax_part(self, name: str, value: Tensor) -> Tensor:
        shape, blocks = self._absmax_shape(), blocks_of(self.shape)
        if tuple(value.shape) != shape:
            value = whole_of(value)
            if not self._by_rows or tuple(value.shape) != (blocks,):
                expected = f"{shape} or ({blocks},)" if self._by_rows else f"{shape}"
                hint = "" if self._by_rows else ": parts that are not rows go on in the same number alone"
                raise ValueError(
                    f"{self.what}: {name}: expected shape {expected}, got {tuple(value.shape)}{hint}"
                )
            value = to_table(value, self.shape)
        part = self._shard(value)
        return part if self._by_rows else part.reshape(-1)[: blocks_of(self.part_shape)]

    def _shard(self, value: Any) -> Tensor:
        """The local shard of a value that is sharded like the parameter."""
        if is_sharded(value):
            if value.device_mesh == self.mesh:
                if tuple(value.placements) == self.placements:
                    return part_of(value)
                return part_of(_on_mesh(value).redistribute(placements=self.placements))
            value = whole_of(value)
        from torch.distributed.tensor import distribute_tensor

        # Every process has the whole value: nothing is sent.
        return part_of(distribute_tensor(value, self.mesh, self.placements, src_data_rank=None))

    def _dtensor(self, part: Tensor, shape: tuple[int, ...]) -> Any:
        # DTensor.from_local would move shards of CPU-offloaded parameters to the GPU.
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        strides = torch.empty(shape, device="meta").stride()
        meta = TensorMeta(torch.Size(shape), strides, part.dtype)
        return DTensor(part, DTensorSpec(self.mesh, self.placements, tensor_meta=meta), requires_grad=False)


def whole_of(t: Any) -> Tensor:
    """A DTensor gathered; any other tensor itself."""
    found: Tensor = _on_mesh(t).full_tensor() if is_sharded(t) else t
    return found


def _on_mesh(t: DTensor) -> Any:
    """Moved to the mesh's device type for collectives: paged moments are in host memory."""
    return t.to(t.device_mesh.device_type)


def check_gradient(p: Any, grad: Any, name: str) -> None:
    """Raises ValueError if a gradient is sharded differently from its parameter."""
    if is_sharded(p) != is_sharded(grad):
        kinds = [type(t).__name__ if is_sharded(t) else "a plain tensor" for t in (p, grad)]
        raise ValueError(f"{name}: gradient: expected {kinds[0]} like the parameter, got {kinds[1]}")
    if is_sharded(p) and (p.device_mesh, p.placements) != (grad.device_mesh, grad.placements):
        raise ValueError(
            f"{name}: gradient: expected placements {p.placements} on {p.device_mesh}, got {grad.placements} "
            f"on {grad.device_mesh}"
        )


def refuse_flat_parts(p: Tensor, name: str) -> None:
    """Raises ValueError for clipping with flat shards of FSDP 1, which cannot be told apart from replicas."""
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{name}: max_grad_norm: expected parameters of FSDP 2 (fully_shard), got a part of FSDP 1's: "
            "clip with its clip_grad_norm_"
        )


def clipped_scale(grads: Sequence[Any], grad_scale: Tensor | None, max_norm: float) -> Tensor:
    """The divisor of gradients that clips their norm over all processes to max_norm.

    fp32, 0-dim, on the gradients' device, without a host synchronisation. Each shard counts once however many
    replicas it has; plain tensors are taken to be replicas.
    """
    by_meshes: dict[Any, list[Tensor]] = {}
    for grad in grads:
        key = (grad.device_mesh, mesh_dims(grad)) if is_sharded(grad) else None
        by_meshes.setdefault(key, []).append(part_of(grad))
    device = part_of(grads[0]).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for key, parts in by_meshes.items():
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        norms = torch._foreach_norm(parts, 2, dtype=dtype)
        squares = torch.stack(norms).double().square().sum()
        if key is not None:
            mesh, dims = key
            for dim in dims:
                torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
        total += squares
    scale = torch.ones((), device=device) if grad_scale is None else grad_scale.to(device, torch.float32)
    norm = (total.sqrt() / scale.reshape(())).float()
    return scale.reshape(()) / (max_norm / (norm + 1e-6)).clamp(max=1)
