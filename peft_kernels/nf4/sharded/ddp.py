"""Packed weights under DistributedDataParallel, which broadcasts the first process's parameters, frozen ones
too, as flat tensors of one dtype.

A packed weight takes part as a `BroadcastBuffer` of its bytes instead of being dequantised. Processes that
loaded the same checkpoint hold the same bytes: fingerprints are compared first, and then nothing is sent.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ...core.fingerprint import fingerprint
from ...core.packed_state import PackedState


def is_ddp_broadcast(caller: FrameType) -> bool:
    """Whether this frame runs the function of torch that collects the tensors which DDP broadcasts.

    It calls `detach()` on each parameter. Only the calling function tells that apart from other uses.
    """
    function = getattr(sys.modules.get("torch.distributed.utils"), "_sync_module_states", None)
    return function is not None and caller.f_code is function.__code__


class BroadcastBuffer(Tensor):
    """The bytes of packed weights, uint8 (nbytes,), while DDP broadcasts them.

    Supports only what DDP does with such a tensor: take a flat view, concatenate, broadcast, slice, and copy
    each slice back.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    parts: list[Tensor]
    """Tensors that hold the bytes; empty for a slice whose bytes are already in place."""
    layouts: list[Any]
    """Shape, dtype and name of each part, compared between processes."""
    received: Tensor | None
    """uint8 (nbytes,), received from the first process; None if nothing was sent."""

    @staticmethod
    def __new__(cls, parts: list[Tensor], layouts: list[Any], size: int, device: torch.device) -> Any:
        self = torch.Tensor._make_wrapper_subclass(cls, (size,), dtype=torch.uint8, device=device)
        self.parts, self.layouts, self.received = parts, layouts, None
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def of(cls, state: PackedState, dtype: torch.dtype) -> BroadcastBuffer:
        """The buffer of a packed weight of nominal dtype `dtype`."""
        tensors = state.tensors()
        kind = state.shape, str(dtype), state.format, state.blocksize
        layouts = [(*kind, name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
        return cls.joined(list(tensors.values()), layouts)

    @classmethod
    def joined(cls, parts: list[Tensor], layouts: list[Any]) -> BroadcastBuffer:
        buffer: BroadcastBuffer = cls(parts, layouts, sum(part.nbytes for part in parts), parts[0].device)
        return buffer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func.name())
        if handler is None:
            raise NotImplementedError(f"{func.name()}: expected a tensor, got bytes that are sent by DDP")
        return handler(func, *args, **(kwargs or {}))


def _view(func: Any, buffer: BroadcastBuffer, size: Any) -> BroadcastBuffer:
    return BroadcastBuffer(buffer.parts, buffer.layouts, buffer.numel(), buffer.device)


def _cat(func: Any, tensors: list[Tensor], dim: int = 0) -> BroadcastBuffer:
    parts: list[Tensor] = []
    layouts: list[Any] = []
    for tensor in tensors:  # may include ordinary uint8 tensors
        if isinstance(tensor, BroadcastBuffer):
            parts += tensor.parts
            layouts += tensor.layouts
        else:
            parts.append(tensor)
            layouts.append(tuple(tensor.shape))
    return BroadcastBuffer.joined(parts, layouts)


def _broadcast(func: Any, tensors: list[BroadcastBuffer], process_group: Any, root: int, *rest: Any) -> Any:
    """Returns the tensors and the pending work, as the op of torch does."""
    import torch.distributed as dist

    (buffer,) = tensors
    group = dist.ProcessGroup.unbox(process_group)
    own = torch.tensor([_number(buffer.layouts), _number([fingerprint(part) for part in buffer.parts])])
    own = own.to(buffer.device)
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    try:
        dist.all_gather(everyone, own, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "DistributedDataParallel: expected packed weights in every process, to compare them, and one has "
            f"not answered: load and quantise the same model in each ({error})"
        ) from error
    layouts, contents = torch.stack(everyone).t().tolist()
    if others := [rank for rank, one in enumerate(layouts) if one != layouts[root]]:
        raise RuntimeError(
            "DistributedDataParallel: expected packed weights of the same shapes, dtypes, formats and "
            "blocksizes in each process, got others in process "
            f"{', '.join(map(str, others))} than in process {root}: load the same checkpoint, and quantise "
            "it alike"
        )
    if len(set(contents)) == 1:
        return tensors, func([own], process_group, root, *rest)[1]
    if contents[group.rank()] != contents[root]:
        warnings.warn(
            f"DistributedDataParallel: process {group.rank()} had other packed weights than process {root}, "
            "whose bytes it has taken over",
            stacklevel=2,
        )
    buffer.received = torch.cat([part.detach().reshape(-1).view(torch.uint8) for part in buffer.parts])
    return tensors, func([buffer.received], process_group, root, *rest)[1]


def _slice(
    func: Any, buffer: BroadcastBuffer, dim: int = 0, start: int = 0, end: int = 0, step: int = 1
) -> Tensor:
    if buffer.received is not None:
        return buffer.received[start:end]
    return BroadcastBuffer([], [], end - start, buffer.device)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, BroadcastBuffer):  # nothing was sent
        return target
    assert isinstance(target, BroadcastBuffer)
    start = 0
    for part in target.parts:
        piece = source[start : start + part.nbytes].clone()  # aligned for any dtype
        part.copy_(piece.view(part.dtype).view(part.shape))
        start += part.nbytes
    return target


_HANDLERS: dict[str, Callable[..., Any]] = {
    "aten::view": _view,
    "aten::cat": _cat,
    "aten::slice.Tensor": _slice,
    "aten::copy_": _copy_,
    "c10d::broadcast_": _broadcast,
}


def _number(value: Any) -> int:
    """A hash that is equal in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
