"""NF4Shard: the rows of an NF4Weight that one of several processes has, as FSDP2 and DTensor ask for them.

`fully_shard` cuts a parameter by `split`, keeps a part in a DTensor, and gathers the whole before use: packed
bytes and first-level scales travel, never dense values. A shard is read as dense values of its rows, on a
copy; it is written to only from other shards, as a checkpoint is loaded. Any other write raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_map

from ...core.code_tables import WEIGHT_DTYPES
from .. import tensor as nf4_tensor
from ..multiples import EACH, Multiple, Share, each, outcome
from ..read_only import has_views, read_only, written
from ..weight import NF4Weight
from .local_rows import Part, joined, separated
from .partition import Cut

aten = torch.ops.aten

Size = tuple[int, ...] | torch.Size


class NF4Shard(Tensor):
    """Rows of an NF4Weight: a Tensor (rows, in_features), or (experts, out_features, in_features), of the
    weight's nominal dtype.

    Torch's shape may be another than that of its rows: FSDP2 pads shards to one size, and views them flat.
    """

    _part: Part
    _gathered: bool = False
    """Whether it is the whole, gathered, with padding behind it."""

    @staticmethod
    def __new__(cls, part: Part, dtype: torch.dtype, shape: Size | None = None) -> Any:
        shape = (part.rows, *part.cut.shape[1:]) if shape is None else shape
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=part.packed.device)
        self._part = part
        return self

    def __init__(self, part: Part, dtype: torch.dtype, shape: Size | None = None) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in nf4_tensor.STORAGE_READS:
                return func(args[0].dequantize(), *args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _HANDLERS.get(func, _read)(func, args, kwargs or {})

    def _share(self) -> Share:
        return Share(self.shape, self._part.tensors(), 1.0)

    @property
    def packed(self) -> Tensor:
        """uint8, flat: the bytes of all blocks that the rows touch."""
        return self._part.packed

    @property
    def absmax(self) -> Tensor:
        """Scales of these blocks, flat: fp32, or uint8 when double-quantised."""
        return self._part.absmax

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense rows, to the bit those of the whole weight; of its own shape and dtype by default."""
        dense = self._part.dequantize(dtype or self.dtype)
        if dense.shape == self.shape:
            return dense
        return F.pad(dense.view(-1), (0, self.numel() - dense.numel())).view(self.shape)

    # FSDP2. It takes two signatures of the first; with the one that has the mesh alone it asks for no inputs
    # of the padded shard's size, and so takes any number of rows.

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """What is gathered, flat, and of the same sizes in all processes."""
        count = mesh.size()
        inputs = self._part.inputs(count)
        if count == 1:  # torch then looks at one input alone
            inputs = [joined(inputs)]
        return tuple(inputs), (count, self._part)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Any:
        """The whole weight, and the tensors of its memory that FSDP2 is to free; or, in `out`, that of an
        earlier call filled again.

        What it holds stays the same tensors from call to call: backward passes have saved them.
        """
        count, part = (
            metadata  # where the parameters are offloaded, `part` is on the device and `self` is not
        )
        gathered = list(all_gather_outputs)
        if count == 1:
            gathered = separated(gathered[0], part.inputs(1))
        seamless = part.cut.is_seamless(part.cut.rows_of_part(count))
        second = part.second_level(gathered)
        if out is not None:
            state = _local(out)._state
            if not seamless:
                assert state.packed is not None and state.absmax is not None
                outputs = [state.packed.view(-1), state.absmax.view(-1)]
                with _unsafe_preserve_version_counter(tuple(t for t in outputs if not t.is_inference())):
                    part.join(count, gathered, outputs)
            state.absmax2, state.offset = second
            return None
        outputs = part.outputs(count, gathered)
        if not seamless:
            part.join(count, gathered, outputs)
        state = part.whole(outputs, second)
        state.gathered = True
        return NF4Weight(state, param_dtype), () if seamless else tuple(outputs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        part = self._part
        shape = ", ".join(map(str, self.shape))
        return (
            f"NF4Shard({shape}, dtype={self.dtype}, device={self.device}, "
            f"rows={part.start}:{part.stop} of {part.cut.rows})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._part.owned(), self.dtype, tuple(self.shape))


def _rebuild(part: Part, dtype: torch.dtype, shape: Size) -> NF4Shard:
    return NF4Shard(part, dtype, shape)


# For torch.load(weights_only=True): they hold tensors and numbers, and do nothing.
torch.serialization.add_safe_globals([_rebuild, Part, Cut])


def _local(weight: Any) -> NF4Weight:
    found: NF4Weight = getattr(weight, "_local_tensor", weight)
    return found


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, NF4Shard) else value


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other op, on dense values."""
    if func in EACH:
        return each(func, args, kwargs)
    share = outcome(func, args, kwargs)
    for target in written(func, args, kwargs):
        if isinstance(target, NF4Shard):
            if share is not None and share.is_once(target._share()):
                return target
            part = target._part
            raise NotImplementedError(
                f"{part.name}: rows {part.start} to {part.stop} of an NF4 weight, one process's part of it, "
                f"were to be written by {func}, expected writes (a merge, say) to the whole weight, before "
                "it is sharded or after it is gathered (full_tensor)"
            )
    dense_args, dense_kwargs = tree_map(_dense, (args, kwargs))
    out = func(*dense_args, **dense_kwargs)
    return read_only(out) if has_views(func) else Multiple.of(out, share)


def _like(shard: NF4Shard, part: Part, shape: Size | None = None) -> NF4Shard:
    return NF4Shard(part, shard.dtype, shard.shape if shape is None else shape)


def _alias(func: Any, args: Any, kwargs: Any) -> NF4Shard:
    new = _like(args[0], args[0]._part)
    new._gathered = args[0]._gathered
    return new


def _clone(func: Any, args: Any, kwargs: Any) -> NF4Shard:
    return _like(args[0], args[0]._part.map(torch.clone))


def _blank(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The same rows in memory of their own, zeros: what asynchronous checkpoints are staged in."""
    shard = args[0]
    if kwargs.get("dtype") not in (None, shard.dtype):
        found: Tensor = _read(func, args, kwargs)
        return found
    device = kwargs.get("device")
    return _like(shard, shard._part.map(lambda t: torch.zeros_like(t, device=device)))


def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The bytes move between devices; a new dtype is a new nominal dtype."""
    shard = args[0]
    dtype = kwargs.get("dtype") or shard.dtype
    if dtype not in WEIGHT_DTYPES:
        dense: Tensor = _read(func, args, kwargs)
        return dense
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    part = shard._part.map(lambda t: t.to(device, non_blocking=non_blocking, copy=True))
    return NF4Shard(part, dtype, shard.shape)


def _pin_memory(func: Any, args: Any, kwargs: Any) -> NF4Shard:
    return _like(args[0], args[0]._part.map(lambda t: t.pin_memory()))


def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    part = args[0]._part
    return bool(part.packed.is_pinned() and part.absmax.is_pinned())


def _record_stream(func: Any, args: Any, kwargs: Any) -> None:
    for tensor in args[0]._part.tensors().values():
        tensor.record_stream(args[1])


def _view(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Flat, or of its own shape."""
    shard, size = args[0], list(args[1])
    if size.count(-1) == 1 and shard.numel():
        size[size.index(-1)] = shard.numel() // -prod(size)
    if size in ([shard.numel()], list(shard.shape)):
        return _like(shard, shard._part, tuple(size))
    found: Tensor = _read(func, args, kwargs)
    return found


def _as_strided(func: Any, args: Any, kwargs: Any) -> Tensor:
    tensor, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if tuple(size) == tensor.shape and tuple(stride) == tensor.stride() and not offset:
        alias: Tensor = tensor.detach()
        return alias
    return _elsewhere(func, args, kwargs)


def _slice(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Rows, in the same memory. Those from the first to the last stay so when more are loaded."""
    shard = args[0]
    dim, start, stop, step = _given(args, kwargs, dim=0, start=None, end=None, step=1)
    part = shard._part
    if dim % shard.dim() != 0 or step != 1 or shard.dim() != len(part.cut.shape):
        found: Tensor = _read(func, args, kwargs)
        return found
    start, stop, _ = slice(start, stop).indices(shard.shape[0])
    rows = max(stop - start, 0)
    if shard._gathered and start == 0 and rows == part.cut.rows:
        return NF4Weight(part.whole((part.packed, part.absmax), (part.absmax2, part.offset)), shard.dtype)
    if start == 0 and rows >= part.rows:
        return _like(shard, part, (rows, *shard.shape[1:]))
    if start + rows > part.rows:  # into the padding
        return _elsewhere(func, args, kwargs)
    return NF4Shard(part.narrow(start, start + rows), shard.dtype)


def _split(func: Any, args: Any, kwargs: Any) -> Any:
    weight, rows = args[:2]
    (dim,) = _given(args[1:], kwargs, dim=0)
    if dim % weight.dim() != 0 or not _can_be_cut(weight) or rows < 1:
        return _elsewhere(func, args, kwargs)
    whole = Part.of(weight._state)
    return [NF4Shard(whole.narrow(*part), weight.dtype) for part in whole.cut.parts(rows)]


def _new_zeros(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Of rows like the weight's or the shard's: a shard that has none yet, to be filled from another."""
    tensor, size = args[:2]
    own = {"dtype": tensor.dtype, "device": tensor.device, "layout": tensor.layout, "pin_memory": False}
    other = any(kwargs.get(name) not in (None, value) for name, value in own.items())
    part = tensor._part if isinstance(tensor, NF4Shard) else None
    if part is None and _can_be_cut(tensor):
        part = Part.of(tensor._state)
    if part is None or other or tuple(size[1:]) != part.cut.shape[1:] or size[0] > part.cut.rows:
        return _elsewhere(func, args, kwargs)
    return NF4Shard(part.blank(size[0]), tensor.dtype, tuple(size))


def _new_empty(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Of its own shape a shard, of another a plain tensor."""
    shard, size = args[:2]
    if tuple(size) == shard.shape and kwargs.get("dtype") in (None, shard.dtype):
        return _blank(func, args[:1], kwargs)
    found: Tensor = func(shard._part.packed, size, **({"dtype": shard.dtype} | kwargs))
    return found


def _pad(func: Any, args: Any, kwargs: Any) -> Tensor:
    """With rows behind the last, as DTensor pads before it gathers."""
    shard, (*others, rows) = args[:2]
    if any(others) or rows < 0 or len(others) + 1 != 2 * shard.dim():
        found: Tensor = _read(func, args, kwargs)
        return found
    return _like(shard, shard._part, (shard.shape[0] + rows, *shard.shape[1:]))


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if not (isinstance(target, NF4Shard) and isinstance(source, NF4Shard)):
        return _read(func, args, kwargs)
    if target.shape != source.shape:
        raise ValueError(
            f"{target._part.name}: expected shape {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    target._part.load(source._part)
    return target


def _all_gather(func: Any, args: Any, kwargs: Any) -> Tensor:
    """DTensor's: the whole weight, with padding behind it where its rows do not divide."""
    shard, count, group = args
    part, collectives = shard._part, torch.ops._c10d_functional
    gathered = [collectives.wait_tensor(func(tensor, count, group)) for tensor in part.inputs(count)]
    _wait_for_none()
    flat = part.outputs(count, gathered)
    if not part.cut.is_seamless(part.cut.rows_of_part(count)):
        part.join(count, gathered, flat)
    state, rows = part.whole(flat, part.second_level(gathered)), shard.shape[0] * count
    if rows == part.cut.rows:
        return NF4Weight(state, shard.dtype)
    whole = NF4Shard(Part.of(state), shard.dtype, (rows, *shard.shape[1:]))
    whole._gathered = True
    return whole


@functools.cache
def _wait_for_none() -> None:
    """What DTensor does to a tensor that is under way leaves these as they are: they have been waited for."""
    for name in (
        "wait_tensor",
        "_wrap_tensor_autograd",
    ):  # the second since torch 2.11, which defines it late
        op = getattr(torch.ops._c10d_functional, name, None)
        if op is not None:
            _HANDLERS[op.default] = _alias
            nf4_tensor.handle({op.default: lambda func, args, kwargs: args[0].detach()})


def _can_be_cut(weight: Any) -> bool:
    state = weight._state if isinstance(weight, NF4Weight) else None
    return state is not None and state.dense is None and state.part_of is None and prod(state.shape) > 0


def _elsewhere(func: Any, args: Any, kwargs: Any) -> Any:
    """As any op on a weight or a shard."""
    return (_read if isinstance(args[0], NF4Shard) else nf4_tensor.on_dense)(func, args, kwargs)


def _given(args: Any, kwargs: Any, **defaults: Any) -> list[Any]:
    """Arguments of an op behind the first."""
    found = []
    for i, (name, default) in enumerate(defaults.items(), start=1):
        found.append(args[i] if i < len(args) else kwargs.get(name, default))
    return found


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.empty_like.default: _blank,
    aten.zeros_like.default: _blank,
    aten._to_copy.default: _to_copy,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: _is_pinned,
    aten.record_stream.default: _record_stream,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
    aten.slice.Tensor: _slice,
    aten.new_zeros.default: _new_zeros,
    aten.new_empty.default: _new_empty,
    aten.constant_pad_nd.default: _pad,
    aten.copy_.default: _copy,
}

_OF_WEIGHTS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.as_strided.default: _as_strided,
}

nf4_tensor.handle(_OF_WEIGHTS)
if torch.distributed.is_available():
    _HANDLERS[torch.ops._c10d_functional.all_gather_into_tensor.default] = _all_gather
