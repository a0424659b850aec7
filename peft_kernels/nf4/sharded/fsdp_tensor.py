"""NF4Shard: one process's rows of a PackedWeight under FSDP2 and DTensor.

`fully_shard` splits a parameter, keeps one shard in a DTensor and gathers the whole weight before use. Packed
bytes and first-level scales are sent, never dense values. Reading a shard dequantises a copy of its rows. It
can be written only from other shards, when a checkpoint is loaded; any other write raises.
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
from ...core.packed_state import Share
from .. import tensor as nf4_tensor
from ..multiples import EACH, Multiple, each, outcome
from ..read_only import has_views, read_only, written
from ..weight import PackedWeight
from .local_rows import LocalRows, pack_bytes, unpack_bytes
from .partition import Partition

aten = torch.ops.aten

Size = tuple[int, ...] | torch.Size


class NF4Shard(Tensor):
    """Rows of a PackedWeight: a Tensor (rows, in_features), or (experts, out_features, in_features), of the
    weight's nominal dtype.

    The tensor's shape can differ from that of its rows: FSDP2 pads shards to one size and views them flat.
    """

    _rows: LocalRows
    _gathered: bool = False
    """Whether this is the gathered whole with padding at the end."""

    @staticmethod
    def __new__(cls, part: LocalRows, dtype: torch.dtype, shape: Size | None = None) -> Any:
        shape = (part.rows, *part.partition.shape[1:]) if shape is None else shape
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=part.packed.device)
        self._rows = part
        return self

    def __init__(self, part: LocalRows, dtype: torch.dtype, shape: Size | None = None) -> None:
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
        return Share(self.shape, self._rows.tensors(), 1.0)

    @property
    def packed(self) -> Tensor:
        """uint8, flat: the bytes of all blocks that the rows touch."""
        return self._rows.packed

    @property
    def absmax(self) -> Tensor:
        """Scales of these blocks, flat: fp32, or uint8 if double-quantised."""
        return self._rows.absmax

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense rows, bit-identical to the whole weight's. `dtype` defaults to the nominal dtype."""
        dense = self._rows.dequantize(dtype or self.dtype)
        if dense.shape == self.shape:
            return dense
        return F.pad(dense.view(-1), (0, self.numel() - dense.numel())).view(self.shape)

    # FSDP2 accepts two signatures of fsdp_pre_all_gather. With the one that takes only the mesh, inputs need
    # not have the size of the padded shard, so any number of rows works.

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Flat tensors to gather, of equal sizes in all processes."""
        count = mesh.size()
        inputs = self._rows.gather_inputs(count)
        if count == 1:  # torch then uses only one input
            inputs = [pack_bytes(inputs)]
        return tuple(inputs), (count, self._rows)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Any:
        """The whole weight and its tensors that FSDP2 frees; or None after refilling `out`, the weight of an
        earlier call.

        The tensors stay the same objects between calls, because backward passes have saved them.
        """
        # Where the parameters are offloaded, `part` is on the device and `self` is not.
        count, part = metadata
        gathered = list(all_gather_outputs)
        if count == 1:
            gathered = unpack_bytes(gathered[0], part.gather_inputs(1))
        seamless = part.partition.is_cell_aligned(part.partition.rows_per_rank(count))
        second = part.second_level(gathered)
        if out is not None:
            state = _local(out)._state
            if not seamless:
                outputs = [tensor.view(-1) for tensor in LocalRows.of(state).divided]
                with _unsafe_preserve_version_counter(tuple(t for t in outputs if not t.is_inference())):
                    part.join(count, gathered, outputs)
            if second[0] is not None:
                state.absmax2, state.offset = second
            return None
        outputs = part.gather_outputs(count, gathered)
        if not seamless:
            part.join(count, gathered, outputs)
        state = part.whole(outputs, second)
        state.gathered = True
        return PackedWeight(state, param_dtype), () if seamless else tuple(outputs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        part = self._rows
        shape = ", ".join(map(str, self.shape))
        return (
            f"NF4Shard({shape}, dtype={self.dtype}, device={self.device}, "
            f"rows={part.start}:{part.stop} of {part.partition.rows})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._rows.with_own_memory(), self.dtype, tuple(self.shape))


def _rebuild(part: LocalRows, dtype: torch.dtype, shape: Size) -> NF4Shard:
    return NF4Shard(part, dtype, shape)


# For torch.load(weights_only=True): plain containers of tensors and numbers.
torch.serialization.add_safe_globals([_rebuild, LocalRows, Partition])


def _local(weight: Any) -> PackedWeight:
    return getattr(weight, "_local_tensor", weight)


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, NF4Shard) else value


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs any other op on dense values."""
    if func in EACH:
        return each(func, args, kwargs)
    share = outcome(func, args, kwargs)
    for target in written(func, args, kwargs):
        if isinstance(target, NF4Shard):
            if share is not None and share.is_once(target._share()):
                return target
            part = target._rows
            raise NotImplementedError(
                f"{part.name}: {func} would write to rows {part.start} to {part.stop} of an NF4 weight, one "
                "process's shard; expected writes (a merge, say) to the whole weight, before it is sharded "
                "or after it is gathered (full_tensor)"
            )
    dense_args, dense_kwargs = tree_map(_dense, (args, kwargs))
    out = func(*dense_args, **dense_kwargs)
    return read_only(out) if has_views(func) else Multiple.of(out, share)


def _like(shard: NF4Shard, part: LocalRows, shape: Size | None = None) -> NF4Shard:
    return NF4Shard(part, shard.dtype, shard.shape if shape is None else shape)


def _alias(func: Any, args: Any, kwargs: Any) -> NF4Shard:
    new = _like(args[0], args[0]._rows)
    new._gathered = args[0]._gathered
    return new


def _clone(func: Any, args: Any, kwargs: Any) -> NF4Shard:
    return _like(args[0], args[0]._rows.map(torch.clone))


def _blank(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros of the same form, in which asynchronous checkpoints are staged."""
    shard = args[0]
    if kwargs.get("dtype") not in (None, shard.dtype):
        return _read(func, args, kwargs)
    device = kwargs.get("device")
    return _like(shard, shard._rows.map(lambda t: torch.zeros_like(t, device=device)))


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Moves the bytes between devices; a new dtype changes only the nominal dtype."""
    shard = args[0]
    dtype = kwargs.get("dtype") or shard.dtype
    if dtype not in WEIGHT_DTYPES:
        return _read(func, args, kwargs)
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    part = shard._rows.map(lambda t: t.to(device, non_blocking=non_blocking, copy=True))
    return NF4Shard(part, dtype, shard.shape)


def _pin_memory(func: Any, args: Any, kwargs: Any) -> NF4Shard:
    return _like(args[0], args[0]._rows.map(lambda t: t.pin_memory()))


def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    part = args[0]._rows
    return bool(part.packed.is_pinned() and part.absmax.is_pinned())


def _record_stream(func: Any, args: Any, kwargs: Any) -> None:
    for tensor in args[0]._rows.tensors().values():
        tensor.record_stream(args[1])


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A flat view, or one of its own shape."""
    shard, size = args[0], list(args[1])
    if size.count(-1) == 1 and shard.numel():
        size[size.index(-1)] = shard.numel() // -prod(size)
    if size in ([shard.numel()], list(shard.shape)):
        return _like(shard, shard._rows, tuple(size))
    return _read(func, args, kwargs)


def _as_strided(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if tuple(size) == tensor.shape and tuple(stride) == tensor.stride() and not offset:
        return tensor.detach()
    return _default(func, args, kwargs)


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    """A slice of rows, sharing memory."""
    shard = args[0]
    dim, start, stop, step = _arguments(args, kwargs, dim=0, start=None, end=None, step=1)
    part = shard._rows
    if dim % shard.dim() != 0 or step != 1 or shard.dim() != len(part.partition.shape):
        return _read(func, args, kwargs)
    start, stop, _ = slice(start, stop).indices(shard.shape[0])
    rows = max(stop - start, 0)
    if shard._gathered and start == 0 and rows == part.partition.rows:
        return PackedWeight(part.whole(part.divided, (part.absmax2, part.offset)), shard.dtype)
    if start == 0 and rows >= part.rows:
        return _like(shard, part, (rows, *shard.shape[1:]))
    if start + rows > part.rows:  # reaches into the padding
        return _default(func, args, kwargs)
    return NF4Shard(part.narrow(start, start + rows), shard.dtype)


def _split(func: Any, args: Any, kwargs: Any) -> Any:
    weight, rows = args[:2]
    (dim,) = _arguments(args[1:], kwargs, dim=0)
    if dim % weight.dim() != 0 or not _can_be_sharded(weight) or rows < 1:
        return _default(func, args, kwargs)
    whole = LocalRows.of(weight._state)
    return [NF4Shard(whole.narrow(*part), weight.dtype) for part in whole.partition.row_ranges(rows)]


def _new_zeros(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A shard without rows yet, to be filled from another one; for other row shapes a plain tensor."""
    tensor, size = args[:2]
    own = {"dtype": tensor.dtype, "device": tensor.device, "layout": tensor.layout, "pin_memory": False}
    other = any(kwargs.get(name) not in (None, value) for name, value in own.items())
    part = tensor._rows if isinstance(tensor, NF4Shard) else None
    if part is None and _can_be_sharded(tensor):
        part = LocalRows.of(tensor._state)
    if part is None or other or tuple(size[1:]) != part.partition.shape[1:] or size[0] > part.partition.rows:
        return _default(func, args, kwargs)
    return NF4Shard(part.empty(size[0]), tensor.dtype, tuple(size))


def _new_empty(func: Any, args: Any, kwargs: Any) -> Any:
    """A shard for its own shape, a plain tensor for another one."""
    shard, size = args[:2]
    if tuple(size) == shard.shape and kwargs.get("dtype") in (None, shard.dtype):
        return _blank(func, args[:1], kwargs)
    return func(shard._rows.packed, size, **({"dtype": shard.dtype} | kwargs))


def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Appends rows of padding, as DTensor does before it gathers."""
    shard, (*others, rows) = args[:2]
    if any(others) or rows < 0 or len(others) + 1 != 2 * shard.dim():
        return _read(func, args, kwargs)
    return _like(shard, shard._rows, (shard.shape[0] + rows, *shard.shape[1:]))


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if not (isinstance(target, NF4Shard) and isinstance(source, NF4Shard)):
        return _read(func, args, kwargs)
    if target.shape != source.shape:
        raise ValueError(
            f"{target._rows.name}: expected shape {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    target._rows.load(source._rows)
    return target


def _all_gather(func: Any, args: Any, kwargs: Any) -> Tensor:
    """DTensor's gather: the whole weight, with padding at the end if its rows do not divide evenly."""
    shard, count, group = args
    part, collectives = shard._rows, torch.ops._c10d_functional
    gathered = [collectives.wait_tensor(func(tensor, count, group)) for tensor in part.gather_inputs(count)]
    _register_wait_ops()
    flat = part.gather_outputs(count, gathered)
    if not part.partition.is_cell_aligned(part.partition.rows_per_rank(count)):
        part.join(count, gathered, flat)
    state, rows = part.whole(flat, part.second_level(gathered)), shard.shape[0] * count
    if rows == part.partition.rows:
        return PackedWeight(state, shard.dtype)
    whole = NF4Shard(LocalRows.of(state), shard.dtype, (rows, *shard.shape[1:]))
    whole._gathered = True
    return whole


@functools.cache
def _register_wait_ops() -> None:
    """Registers DTensor's wait ops, which DTensor calls on gathered tensors, as no-ops: `_all_gather`
    waits."""
    # The second since torch 2.11, which defines it late.
    for name in ("wait_tensor", "_wrap_tensor_autograd"):
        op = getattr(torch.ops._c10d_functional, name, None)
        if op is not None:
            _HANDLERS[op.default] = _alias
            nf4_tensor.register_handlers({op.default: lambda func, args, kwargs: args[0].detach()})


def _can_be_sharded(weight: Any) -> bool:
    state = weight._state if isinstance(weight, PackedWeight) else None
    return state is not None and state.dense is None and state.part_of is None and prod(state.shape) > 0


def _default(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs the default handler of a weight or a shard."""
    return (_read if isinstance(args[0], NF4Shard) else nf4_tensor.on_dense)(func, args, kwargs)


def _arguments(args: Any, kwargs: Any, **defaults: Any) -> list[Any]:
    """Arguments of an op after the first, with defaults."""
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

nf4_tensor.register_handlers(_OF_WEIGHTS)
if torch.distributed.is_available():
    _HANDLERS[torch.ops._c10d_functional.all_gather_into_tensor.default] = _all_gather
