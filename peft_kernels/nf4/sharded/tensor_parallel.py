"""NF4 weights under transformers' plans for tensor parallelism: which can be cut, what a process has of them,
and the whole again.

transformers makes DTensors of the weights that a plan names, on the meta device, and then reads the
checkpoint. A part is cut from the whole weight once that is packed, so its bits are those of one process. It
is the DTensor's local tensor, which transformers' hooks put into the layer while its forward runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ...core.nf4_state import NF4State, packed_rows
from ..weight import NF4Weight
from .checks import is_dtensor, is_parallel
from .tp_slices import Second, cut, first_level, nest, size_of_part, why_whole


def count_of(model: Any) -> int:
    """Processes among which transformers is to cut a model's weights."""
    config = getattr(model.config, "distributed_config", None)
    return int(getattr(config, "tp_size", None) or 1)


def refuse_others(model: Any) -> None:
    """ValueError for what else transformers distributes: pipelines, experts, FSDP2 of its own."""
    config = getattr(model.config, "distributed_config", None)
    sizes = ("pp_size", "ep_size", "fsdp_size", "dp_replicate_size")
    got = [f"{name}={getattr(config, name)}" for name in sizes if (getattr(config, name, None) or 1) > 1]
    if got:
        raise ValueError(
            "distributed_config: expected a plan for tensor parallelism alone (tp_plan) for a 4-bit model, "
            f"got {', '.join(got)}: shard it by FSDP2 once it is loaded (docs/recipes/distributed.md); "
            "pipelines and plans for experts are for dense weights only"
        )


def check(model: Any, layers: Iterable[str], experts: Iterable[str], blocksize: int) -> None:
    """Before anything is changed, alike in every process: ValueError where a plan cuts what cannot be cut to
    the bit.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device, not distributed yet.
    layers, experts : names
        Of NF4Linear layers, and of modules of experts that are to be packed.
    blocksize : int
        Of their weights.
    """
    if not hasattr(model, "_resolve_parallel_plans"):  # new in 5.24, as are plans over DTensors read whole
        raise ValueError(
            f"transformers: expected 5.24 or later for plans over NF4, got {transformers.__version__}"
        )
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    plan, count = model._resolve_parallel_plans(model.config.distributed_config)[0], count_of(model)
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
            continue  # every process has all of it
        dim = _dim_of(style)
        if dim is None or not issubclass(layer.plain_class, nn.Linear):
            kind = layer.plain_class.__name__
            raise ValueError(
                f"{name}: expected colwise or rowwise for an NF4 weight, got {planned} of a {kind}"
            )
        shape = (layer.out_features, layer.in_features)
        if reason := why_whole(shape, blocksize, dim, count):
            raise ValueError(_refusal(name, planned, count, reason))


def _dim_of(style: Any) -> int | None:
    from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

    return 0 if isinstance(style, ColwiseParallel) else 1 if isinstance(style, RowwiseParallel) else None


def _refusal(name: str, planned: str, count: int, reason: str) -> str:
    return (
        f"{name}: cannot be cut {planned} in 4 bits for {count} processes: {reason}; expected another number "
        "of processes, or the layer in 16 bits (modules_to_not_convert)"
    )


def own_part(weight: NF4Weight, layer: Any) -> NF4Weight:
    """Of a whole packed weight what the plan gives to this process, in memory of its own; the weight itself
    where it is not cut. `layer` awaits it, and notes what the whole is made of."""
    awaiting = layer._parameters["weight"]
    if not is_dtensor(awaiting):
        return weight
    state, mesh, (placement,) = weight._state, awaiting.device_mesh, awaiting.placements
    dim, count = placement.dim % 2, mesh.size()
    if reason := why_whole(state.shape, state.blocksize, dim, count):
        raise ValueError(_refusal(state.name.removesuffix(".weight"), str(placement), count, reason))
    size = size_of_part(state.shape[dim], count)
    start = size * mesh.get_local_rank()
    stop = min(start + size, state.shape[dim])
    if state.absmax2 is not None and state.offset is not None:
        layer.whole_scales = (state.absmax2.to("cpu", copy=True), state.offset.to("cpu", copy=True))
    return NF4Weight(cut(state, dim, start, stop), weight.dtype)


def unname_meshes(model: nn.Module) -> None:
    """Put the weights that are cut on a mesh of the same processes whose dimension has no name.

    PEFT looks at a weight's mesh for the width of adapters: by "tp" it makes them as wide as the local part,
    and then declares their inputs wrongly (0.21); without a name as wide as the layer, and cuts them by the
    plan.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    meshes: dict[Any, Any] = {}
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if not is_parallel(weight):
            continue
        named = weight.device_mesh
        if named not in meshes:
            meshes[named] = DeviceMesh.from_group(named.get_group(), named.device_type)
        about = {"shape": weight.shape, "stride": weight.stride()}
        local, placements = weight._local_tensor, weight.placements
        unnamed = DTensor.from_local(local, meshes[named], placements, run_check=False, **about)
        module._parameters["weight"] = nn.Parameter(unnamed, requires_grad=False)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every NF4 weight whole, on the CPU, in process 0; without them in the others. Every
    process has to call it."""
    state, first = model.state_dict(), dist.get_rank() == 0
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if is_parallel(weight):
            whole = _whole(weight, module.whole_scales)
            del state[f"{name}.weight"]
            if first:
                state |= whole.state_dict(f"{name}.")
    return state


def _whole(weight: Any, second: Second | None) -> NF4Weight:
    """Of a weight that is cut, as it was: double-quantised by its second-level scales, where it had them."""
    mine: NF4State = weight._local_tensor._state
    assert mine.packed is not None and mine.slice_of is not None
    rows, columns = shape = mine.slice_of
    dim, blocksize = weight.placements[0].dim % 2, mine.blocksize
    packed, scales = mine.packed.view(-1), first_level(mine)
    mesh, size, whole = weight.device_mesh, size_of_part(shape[dim], weight.device_mesh.size()), columns
    if dim == 1:
        packed, scales = packed.view(rows, -1), scales.view(rows, -1)
    else:
        size, whole = size * columns, rows * columns
    packed = _gathered(packed, size // 2, mesh)[..., : -(-whole // 2)].reshape(-1)
    scales = _gathered(scales, size // blocksize, mesh)[..., : -(-whole // blocksize)].reshape(-1)
    codes = None if second is None else nest(scales, second)
    absmax2, offset = (None, None) if codes is None or second is None else second
    state = NF4State(
        (rows, columns),
        blocksize,
        packed_rows(packed, shape),
        scales if codes is None else codes,
        absmax2,
        offset,
        name=mine.name,
    )
    return NF4Weight(state, weight.dtype)


def _gathered(tensor: Tensor, size: int, mesh: Any) -> Tensor:
    """All processes' parts beside each other along the last dimension, on the CPU: each of `size` elements,
    but for the last."""
    from torch.distributed.tensor import DTensor, Shard

    padded = F.pad(tensor, (0, size - tensor.shape[-1])).contiguous()
    whole: Tensor = DTensor.from_local(padded, mesh, [Shard(tensor.dim() - 1)], run_check=False).full_tensor()
    return whole.cpu()
