"""NF4 weights under DistributedDataParallel, which gives every process the first one's parameters.

Frozen ones too: it joins all that have one dtype to a flat tensor, and broadcasts that. A packed weight takes
part with its bytes, as a `Parcel`, and not with values, for which it would have to be dequantised. Processes
that have loaded the same checkpoint have the same bytes: fingerprints are compared, and no byte is sent.
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

from ...core.nf4_state import NF4State, fingerprint


def is_asking(caller: FrameType) -> bool:
    """Whether the function that runs in this frame is the one that gathers what DDP broadcasts.

    It calls `detach()` on each parameter, as many others do: nothing else tells them apart.
    """
    function = getattr(sys.modules.get("torch.distributed.utils"), "_sync_module_states", None)
    return function is not None and caller.f_code is function.__code__


class Parcel(Tensor):
    """The bytes of packed weights, uint8 (nbytes,), on their way from process to process.

    It knows what DDP does to a tensor that is to be broadcast, and nothing else: a flat view is taken, views
    are joined, their whole is broadcast and cut up again, and each piece is copied to where it belongs.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    parts: list[Tensor]
    """Where the bytes are. None in a piece of bytes that are there already."""
    meaning: list[Any]
    """What the bytes of each part mean."""
    received: Tensor | None
    """uint8 (nbytes,), what the first process sent; None where nothing had to be."""

    @staticmethod
    def __new__(cls, parts: list[Tensor], meaning: list[Any], size: int, device: torch.device) -> Any:
        self = torch.Tensor._make_wrapper_subclass(cls, (size,), dtype=torch.uint8, device=device)
        self.parts, self.meaning, self.received = parts, meaning, None
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def of(cls, state: NF4State, dtype: torch.dtype) -> Parcel:
        """Of a weight with packed bytes, and what lies on them. `dtype` is the weight's."""
        tensors = state.tensors()
        kind = state.shape, str(dtype), state.blocksize
        meaning = [(*kind, name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
        return cls.joined(list(tensors.values()), meaning)

    @classmethod
    def joined(cls, parts: list[Tensor], meaning: list[Any]) -> Parcel:
        parcel: Parcel = cls(parts, meaning, sum(part.nbytes for part in parts), parts[0].device)
        return parcel

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func.name())
        if handler is None:
            raise NotImplementedError(f"{func.name()}: expected a tensor, got bytes that are sent by DDP")
        return handler(func, *args, **(kwargs or {}))


def _view(func: Any, parcel: Parcel, size: Any) -> Parcel:
    return Parcel(parcel.parts, parcel.meaning, parcel.numel(), parcel.device)


def _cat(func: Any, tensors: list[Tensor], dim: int = 0) -> Parcel:
    parts: list[Tensor] = []
    meaning: list[Any] = []
    for tensor in tensors:  # tensors of bytes that are not ours may be among them
        if isinstance(tensor, Parcel):
            parts += tensor.parts
            meaning += tensor.meaning
        else:
            parts.append(tensor)
            meaning.append(tuple(tensor.shape))
    return Parcel.joined(parts, meaning)


def _broadcast(func: Any, tensors: list[Parcel], process_group: Any, root: int, *rest: Any) -> Any:
    """Returns, as torch's, the tensors and the work that is to be waited for."""
    import torch.distributed as dist

    (parcel,) = tensors
    group = dist.ProcessGroup.unbox(process_group)
    own = torch.tensor([_number(parcel.meaning), _number([fingerprint(part) for part in parcel.parts])])
    own = own.to(parcel.device)
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    try:
        dist.all_gather(everyone, own, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "DistributedDataParallel: expected NF4 weights in every process, to compare them, and one has "
            f"not answered: load and quantise the same model in each ({error})"
        ) from error
    layouts, contents = torch.stack(everyone).t().tolist()
    if others := [rank for rank, one in enumerate(layouts) if one != layouts[root]]:
        raise RuntimeError(
            "DistributedDataParallel: expected NF4 weights of the same shapes, dtypes and blocksizes in each "
            f"process, got others in process {', '.join(map(str, others))} than in process {root}: load the "
            "same checkpoint, and quantise it alike"
        )
    if len(set(contents)) == 1:
        return tensors, func([own], process_group, root, *rest)[1]
    if contents[group.rank()] != contents[root]:
        warnings.warn(
            f"DistributedDataParallel: process {group.rank()} had other NF4 weights than process {root}, "
            "whose bytes it has taken over",
            stacklevel=2,
        )
    parcel.received = torch.cat([part.detach().reshape(-1).view(torch.uint8) for part in parcel.parts])
    return tensors, func([parcel.received], process_group, root, *rest)[1]


def _slice(func: Any, parcel: Parcel, dim: int = 0, start: int = 0, end: int = 0, step: int = 1) -> Tensor:
    if parcel.received is not None:
        return parcel.received[start:end]
    return Parcel([], [], end - start, parcel.device)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, Parcel):  # nothing was sent
        return target
    assert isinstance(target, Parcel)
    start = 0
    for part in target.parts:
        piece = source[start : start + part.nbytes].clone()  # begins where a part of any dtype may
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
    """The same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
