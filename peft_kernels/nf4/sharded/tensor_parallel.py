"""NF4 weights under transformers' plans for tensor parallelism: checks, slices of a process, and gathering.

transformers makes DTensors of the planned weights on the meta device and then reads the checkpoint. A slice
is taken from the whole weight once that is packed, so it has the bits of a single process. It is the
DTensor's local tensor, which transformers' hooks put into the layer while its forward runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ...core.packed_state import PackedState, packed_rows
from ..weight import PackedWeight
from .checks import is_dtensor, is_tensor_parallel
from .tp_slices import Second, encode_scales, one_level_scales, slice_size, slice_state, unsliceable_reason


def tp_size(model: Any) -> int:
    """Number of processes among which transformers splits the weights of a model."""
    config = getattr(model.config, "distributed_config", None)
    return int(getattr(config, "tp_size", None) or 1)


def check_distributed_config(model: Any) -> None:
    """Raises ValueError for other ways in which transformers distributes: pipelines, experts, its own
    FSDP2."""
    config = getattr(model.config, "distributed_config", None)
    sizes = ("pp_size", "ep_size", "fsdp_size", "dp_replicate_size")
    got = [f"{name}={getattr(config, name)}" for name in sizes if (getattr(config, name, None) or 1) > 1]
    if got:
        raise ValueError(
            "distributed_config: expected a plan for tensor parallelism alone (tp_plan) for a 4-bit model, "
            f"got {', '.join(got)}: shard it by FSDP2 once it is loaded (docs/recipes/distributed.md); "
            "pipelines and plans for experts are for dense weights only"
        )


def check(model: Any, layers: Iterable[str], experts: Iterable[str], format: str, blocksize: int) -> None:
    """Raises ValueError if a plan splits a weight that cannot be split exactly. Every process raises the same
    error, before anything is changed.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device, before it is distributed.
    layers, experts : names
        Names of NF4Linear layers, and of experts modules that will be packed.
    format, blocksize : str, int
        Of their weights.
    """
    if not hasattr(model, "_resolve_parallel_plans"):  # new in 5.24, like plans over DTensors
        raise ValueError(
            f"transformers: expected 5.24 or later for plans over NF4, got {transformers.__version__}"
        )
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    plan, count = model._resolve_parallel_plans(model.config.distributed_config)[0], tp_size(model)
    for name in experts:
        if any(planned.startswith(f"{name}.") for planned in plan):
            raise ValueError(
                f"{name}: expected dense experts for a plan for tensor parallelism, got packed ones"
            )
    for name in layers:
        planned = plan.get(f"{name}.weight")
        if planned is None:
            continue
        style, layer = ALL_PARALLEL_STYLES[planned], model.get_submodule(name)
        if type(style).shard_param is TensorParallelLayer.shard_param:
            continue  # replicated
        dim = _dim_of(style)
        if dim is None or not issubclass(layer.plain_class, nn.Linear):
            kind = layer.plain_class.__name__
            raise ValueError(
                f"{name}: expected colwise or rowwise for an NF4 weight, got {planned} of a {kind}"
            )
        shape = (layer.out_features, layer.in_features)
        if reason := unsliceable_reason(shape, format, blocksize, dim, count):
            raise ValueError(_refusal(name, planned, count, reason))


def _dim_of(style: Any) -> int | None:
    from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

    return 0 if isinstance(style, ColwiseParallel) else 1 if isinstance(style, RowwiseParallel) else None


def _refusal(name: str, planned: str, count: int, reason: str) -> str:
    return (
        f"{name}: cannot be cut {planned} while packed for {count} processes: {reason}; expected another "
        "number of processes, or the layer in 16 bits (modules_to_not_convert)"
    )


def local_slice(weight: PackedWeight, layer: Any) -> PackedWeight:
    """This process's slice of a whole packed weight, in memory of its own; the weight itself if the plan does
    not split it. Records the second-level scales of the whole on `layer`."""
    awaiting = layer._parameters["weight"]
    if not is_dtensor(awaiting):
        return weight
    state, mesh, (placement,) = weight._state, awaiting.device_mesh, awaiting.placements
    dim, count = placement.dim % 2, mesh.size()
    if reason := unsliceable_reason(state.shape, state.format, state.blocksize, dim, count):
        raise ValueError(_refusal(state.name.removesuffix(".weight"), str(placement), count, reason))
    size = slice_size(state.shape[dim], count)
    start = size * mesh.get_local_rank()
    stop = min(start + size, state.shape[dim])
    if state.absmax2 is not None and state.offset is not None:
        layer.whole_scales = (state.absmax2.to("cpu", copy=True), state.offset.to("cpu", copy=True))
    return PackedWeight(slice_state(state, dim, start, stop), weight.dtype)


def remove_mesh_names(model: nn.Module) -> None:
    """Moves split weights to a mesh of the same processes whose dimension has no name.

    PEFT derives the width of adapters from a weight's mesh: with the name "tp" it makes them as wide as the
    local slice and declares their inputs wrongly (0.21); without a name it makes them as wide as the layer
    and splits them by the plan."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    meshes: dict[Any, Any] = {}
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if not is_tensor_parallel(weight):
            continue
        named = weight.device_mesh
        if named not in meshes:
            meshes[named] = DeviceMesh.from_group(named.get_group(), named.device_type)
        about = {"shape": weight.shape, "stride": weight.stride()}
        local, placements = weight._local_tensor, weight.placements
        unnamed = DTensor.from_local(local, meshes[named], placements, run_check=False, **about)
        module._parameters["weight"] = nn.Parameter(unnamed, requires_grad=False)


def gather_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole NF4 weights on the CPU in process 0, and without them in other processes.
    Every process must call it."""
    state, first = model.state_dict(), dist.get_rank() == 0
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if is_tensor_parallel(weight):
            whole = _whole(weight, module.whole_scales)
            del state[f"{name}.weight"]
            if first:
                state |= whole.state_dict(f"{name}.")
    return state


def _whole(weight: Any, second: Second | None) -> PackedWeight:
    """Gathers a split weight, double-quantised again if `second` has its second-level scales."""
    mine: PackedState = weight._local_tensor._state
    assert mine.packed is not None and mine.slice_of is not None
    rows, columns = shape = mine.slice_of
    dim, blocksize = weight.placements[0].dim % 2, mine.blocksize
    packed, (scales, values) = mine.packed.view(-1), one_level_scales(mine)
    mesh, size, whole = weight.device_mesh, slice_size(shape[dim], weight.device_mesh.size()), columns
    if dim == 1:
        packed, scales = packed.view(rows, -1), scales.view(rows, -1)
    else:
        size, whole = size * columns, rows * columns
    packed = _gathered(packed, size // 2, mesh)[..., : -(-whole // 2)].reshape(-1)
    scales = _gathered(scales, size // blocksize, mesh)[..., : -(-whole // blocksize)].reshape(-1)
    codes = None if second is None else encode_scales(scales, second)
    absmax2, offset = (values, None) if codes is None or second is None else second
    state = PackedState(
        (rows, columns),
        blocksize,
        packed_rows(packed, shape),
        scales if codes is None else codes,
        absmax2,
        offset,
        name=mine.name,
        format=mine.format,
    )
    return PackedWeight(state, weight.dtype)


def _gathered(tensor: Tensor, size: int, mesh: Any) -> Tensor:
    """Concatenates the tensors of all processes along the last dimension, on the CPU. Each has `size`
    elements there, the last one maybe fewer."""
    from torch.distributed.tensor import DTensor, Shard

    padded = F.pad(tensor, (0, size - tensor.shape[-1])).contiguous()
    whole: Tensor = DTensor.from_local(padded, mesh, [Shard(tensor.dim() - 1)], run_check=False).full_tensor()
    return whole.cpu()
