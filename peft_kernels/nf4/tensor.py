"""torch functions and ops on a 4-bit tensor, by the rules in `weight.PackedWeight`."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.code_tables import WEIGHT_DTYPES
from ..core.packed_state import PARALLEL, Addition, HoldsPacked, PackedState, Share, warn_of_growth
from ..ops.linear import nf4_linear
from .multiples import EACH, Multiple, each, outcome
from .read_only import has_views, read_only, written
from .sharded import ddp

aten = torch.ops.aten

# Reads that may return the weight itself. From a permanently dense weight they return the ordinary tensor:
# assigning a subclass to an ordinary parameter's `data` crashes torch.
_READS = {
    *(Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as),
    *(Tensor.cpu, Tensor.cuda, Tensor.contiguous, Tensor.detach),
}

# Functions that read a storage, which the wrapper lacks.
STORAGE_READS = frozenset((Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__))

FLATTENED = (
    "FSDP1 and DeepSpeed's ZeRO-3 flatten parameters, which packed weights do not support; shard it by FSDP2 "
    "(fully_shard, fsdp_version: 2), or keep it whole under DDP"
)
FROZEN = "NF4 weights are frozen; for full fine-tuning load the model without quantize_model"


class PackedTensor(HoldsPacked):
    """Implements torch's function and op protocols for packed weights."""

    _ddp_ignored = True
    """Excludes it from DDP's mixed precision, which would keep a dense copy in another dtype."""

    @staticmethod
    def __new__(
        cls, state: PackedState | PackedTensor, dtype: torch.dtype | None = None, requires_grad: bool = False
    ) -> Any:
        """A tensor for a state; or a parameter for a tensor, as accelerate constructs parameters."""
        if isinstance(state, PackedTensor):
            return torch.nn.Parameter(state, requires_grad=requires_grad)
        some = next(iter(state.tensors().values()))
        self = torch.Tensor._make_wrapper_subclass(cls, state.shape, dtype=dtype, device=some.device)
        self._state = state
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (out, in) or (experts, out, in): `code * absmax`, rounded once to `dtype`, by
        default its own."""
        dtype = dtype or self.dtype
        if self._state.dense is not None:
            return self._state.dense.to(dtype, copy=True)
        return self._state.dequantize(dtype)

    @property
    def is_dense(self) -> bool:
        """Whether a write (a merge, say) made the weight dense."""
        return self._state.dense is not None

    @property
    def is_merged(self) -> bool:
        """Whether it is dense because of a merge; the packed bytes are kept."""
        return self._state.merged

    @property
    def dense(self) -> Tensor | None:
        """The dense weight (out, in), or None if packed."""
        return self._state.dense

    @property
    def __create_write_items__(self) -> Any:
        """Refuses `torch.distributed.checkpoint` for a slice: it would be saved as the whole weight."""
        self._state.refuse_saving_part()
        raise AttributeError("__create_write_items__")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        handler = _FUNCTIONS.get(func)  # setter wrappers are equal, not identical
        if handler is not None and isinstance(args[0], PackedTensor):
            return handler(func, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func, on_dense)
        return handler(func, args, kwargs or {})


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, PackedTensor) or not isinstance(weight, PackedTensor):
        # NF4 activations and biases are not used by layers, but must still work.
        dense = [t.dequantize() if isinstance(t, PackedTensor) else t for t in (input, weight)]
        return F.linear(dense[0], dense[1], bias)
    if weight.requires_grad:  # a copy to which a trained tensor was added (SHiRA)
        return _plainly(F.linear, input, weight, bias)
    return nf4_linear(input, weight._state, bias)


def _plainly(func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _assign_data(func: Any, self: PackedTensor, value: Tensor) -> None:
    """`self.data = value`."""
    old = self._state
    if isinstance(value, PackedTensor):
        cast = value.__dict__.get("_cast")
        if cast is not None and cast[0]() is old and value._state.packed is cast[1] and not value.is_dense:
            return  # `p.data = p.data.to(dtype)` of PEFT's kbit preparation: nothing to widen
    if isinstance(value, Multiple):
        # float64 is no nominal dtype of packed weights.
        if old.is_once(value._share()) and value.dtype != torch.float64:
            return old.repack()
        value = value._held
    if not (isinstance(value, PackedTensor) and value._state is old):
        old.refuse_part()
    if not isinstance(value, PackedTensor):
        if tuple(value.shape) != old.shape:
            flat = f": {FLATTENED}" if value.dim() == 1 else ""
            raise ValueError(f"{old.name}: data: expected shape {old.shape}, got {tuple(value.shape)}{flat}")
        packed = old.packed is not None
        state = PackedState(
            old.shape,
            old.blocksize,
            dense=value.detach(),
            double_quant=old.double_quant,
            name=old.name,
            format=old.format,
        )
        if packed and not getattr(self, "_in_merge", 0):
            warn_of_growth("for good", state)
        value = type(self)(state, value.dtype)
    _plainly(func, self, value)
    self._state = value._state


def _get_data(func: Any, self: PackedTensor) -> Tensor:
    if self.is_dense and not self.is_merged:
        return _plainly(func, self.dense)
    out: Tensor = _plainly(func, self)
    out.__dict__["_data_of"] = weakref.ref(self._state)
    return out


def _read(func: Any, self: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.is_dense and not self.is_merged:
        return _plainly(func, self.dense, *args, **kwargs)
    out: Tensor = _plainly(func, self, *args, **kwargs)
    source = self.__dict__.get("_data_of")
    if source is not None and isinstance(out, PackedTensor) and out is not self and out.device == self.device:
        out.__dict__["_cast"] = (source, out._state.packed)
    return out


def _detach(func: Any, self: PackedTensor) -> Tensor:
    packed = self._state.packed is not None
    if packed and not torch.compiler.is_compiling() and ddp.is_ddp_broadcast(sys._getframe(2)):
        return ddp.BroadcastBuffer.of(self._state, self.dtype)
    return _read(func, self)


def _read_storage(func: Any, self: PackedTensor, *args: Any, **kwargs: Any) -> Any:
    return func(self.dequantize(), *args, **kwargs)


def _set_requires_grad(func: Any, self: PackedTensor, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise ValueError(f"{self._state.name.removesuffix('.weight')}: {FROZEN}")
    return _plainly(func, self, requires_grad)


def _get_item(func: Any, self: PackedTensor, index: Any) -> Tensor:
    """`weight[i]` of experts: one expert's weight, packed."""
    number = isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int32, torch.int64)
    if self.dim() != 3 or self.is_dense or not (number or type(index) is int):
        return _plainly(func, self, index)
    return type(self)(self._state.expert(int(index)), self.dtype)


def _share_memory(func: Any, self: PackedTensor) -> PackedTensor:
    for tensor in self._state.tensors().values():
        tensor.share_memory_()
    return self


def _is_shared(func: Any, self: PackedTensor) -> bool:
    return all(tensor.is_shared() for tensor in self._state.tensors().values())


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_READS, _read),
    **dict.fromkeys(STORAGE_READS, _read_storage),
    Tensor.detach: _detach,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _assign_data,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    Tensor.requires_grad_: _set_requires_grad,
    Tensor.__getitem__: _get_item,
    Tensor.share_memory_: _share_memory,
    Tensor.is_shared: _is_shared,
}


def _dense(value: Any) -> Any:
    if not isinstance(value, PackedTensor):
        return value
    return value._state.dense if value.is_dense else value.dequantize()


def _not_whole(weight: PackedTensor, what: str) -> str:
    return (
        f"{weight._state.name}: {PARALLEL}, and {what}, expected matmuls only: merges, casts "
        "(prepare_model_for_kbit_training) and adapters that read the base weight (DoRA, PiSSA, OLoRA) "
        "need a model in one process"
    )


def on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs any op on dense values: reads use a dequantised copy, writes make the weight dense first."""
    if func in EACH:
        return each(func, args, kwargs)
    for arg in args:
        if isinstance(arg, PackedTensor) and arg._state.slice_of is not None:
            raise RuntimeError(_not_whole(arg, f"was to be read or written by {func}"))
    targets = [target for target in written(func, args, kwargs) if isinstance(target, PackedTensor)]
    share = outcome(func, args, kwargs)
    for arg in args:
        if has_views(func) and isinstance(arg, PackedTensor) and arg._state.factor is not None:
            arg._state.forget_packed()  # the view may be written to
    if targets:
        return _write(func, args, kwargs, targets, share)
    dense_args, dense_kwargs = tree_map(_dense, (args, kwargs))
    out = func(*dense_args, **dense_kwargs)
    if has_views(func) and any(isinstance(a, PackedTensor) and a._state.packed is not None for a in args):
        return read_only(out)
    return Multiple.of(out, share)


def _write(func: Any, args: Any, kwargs: Any, targets: list[PackedTensor], share: Share | None) -> Any:
    first: Any = args[0] if args else None
    if share is not None and first._state.is_once(share):
        first._state.repack()
        return first
    addition = _addition(func, args, kwargs)
    if addition is not None and first._state.subtracts_the_rest(addition):
        first._state.repack()
        return first
    before = [target._state.dense for target in targets]
    for target in targets:
        target._state.before_write(target.dtype)
    written_to = first._state.dense if isinstance(first, PackedTensor) else None
    dense_args, dense_kwargs = tree_map(_dense, (args, kwargs))
    try:
        out = func(*dense_args, **dense_kwargs)
    except BaseException:
        for target, dense in zip(targets, before, strict=True):
            target._state.dense = dense
        raise
    for target in targets:
        if share is not None:
            target._state.wrote_multiple(share)
        elif addition is not None:
            target._state.added(addition)
        else:
            target._state.wrote()
    if isinstance(first, PackedTensor) and out is written_to:
        return first  # an in-place op returns the argument that it wrote to
    return out


def _addition(func: Any, args: Any, kwargs: Any) -> Addition | None:
    """The addition that an in-place op makes to an NF4 weight, or None for other ops."""
    sign = _ADDS.get(func)
    if sign is None or not isinstance(args[0], PackedTensor) or args[0]._state.packed is None:
        return None
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    return Addition.of(_dense(args[1]), sign * alpha, args[0].dtype)


_ADDS = {aten.add_.Tensor: 1, aten.add_.Scalar: 1, aten.sub_.Tensor: -1, aten.sub_.Scalar: -1}


def _alias(func: Any, args: Any, kwargs: Any) -> Tensor:
    return type(args[0])(args[0]._state, args[0].dtype)


def _clone(func: Any, args: Any, kwargs: Any) -> Tensor:
    return type(args[0])(args[0]._state.map(torch.clone), args[0].dtype)


def _empty_like(func: Any, args: Any, kwargs: Any) -> Tensor:
    """With a device, as `nn.Module.to_empty` calls it: an empty packed weight to load into."""
    weight, device = args[0], kwargs.get("device")
    if device is None or weight.is_dense:
        return on_dense(func, args, kwargs)
    return type(weight)(weight._state.map(lambda t: torch.empty_like(t, device=device)), weight.dtype)


def _new_empty(func: Any, args: Any, kwargs: Any) -> Tensor:
    """For its own shape an empty packed weight (torch.distributed.checkpoint stages in it), else a plain
    tensor."""
    weight, size = args[:2]
    foreign = tuple(size) != weight.shape or kwargs.get("dtype") not in (None, weight.dtype)
    if foreign or weight._state.slice_of is not None:
        return on_dense(func, args, kwargs)
    device = kwargs.get("device")
    return type(weight)(weight._state.map(lambda t: torch.empty_like(t, device=device)), weight.dtype)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`.to()`: moves the bytes between devices; a new dtype changes only the nominal dtype."""
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if weight._state.slice_of is not None and dtype != weight.dtype:
        raise RuntimeError(_not_whole(weight, f"was to be cast to {dtype}"))
    if dtype not in WEIGHT_DTYPES:
        return on_dense(func, args, kwargs)
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    state = weight._state.map(lambda t: t.to(device, non_blocking=non_blocking, copy=True))
    if state.dense is not None:
        state.dense = state.dense.to(dtype)
    return type(weight)(state, dtype)


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if isinstance(target, PackedTensor) and isinstance(source, PackedTensor) and target.shape == source.shape:
        target._state.refuse_part()
        device = target.device
        target._state.become(source._state.map(lambda t: t.to(device, copy=True)))
        return target
    return on_dense(func, args, kwargs)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view of its own shape, as DTensor's `to_local` makes it, is an alias."""
    return (_alias if tuple(args[1]) == args[0].shape else on_dense)(func, args, kwargs)


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.empty_like.default: _empty_like,
    aten.new_empty.default: _new_empty,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.view.default: _view,
}


def register_handlers(handlers: dict[Any, Callable[[Any, Any, Any], Any]]) -> None:
    """Registers op handlers of other modules: shards of weights."""
    _HANDLERS.update(handlers)
