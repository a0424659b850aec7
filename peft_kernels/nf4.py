"""NF4Weight: a 4-bit weight that looks like the ordinary tensor other people's code expects.

It sits in `nn.Linear.weight` as a frozen parameter. PEFT merges with `weight.data += delta`; accelerate,
`model.to()`, deepcopy and state_dict all look at `module.weight`: a tensor subclass lets them. Three rules
keep that honest:

- `F.linear(x, weight)` runs the NF4 kernel; any other read runs on a dequantised copy. A view of that copy
  is read-only: what is written to it would be lost, so that raises.
- A write makes the weight *dense*, for every alias of it: what is written is kept in full, never rounded back
  to 4 bits or lost with a temporary. `requantize_()` packs it again.
- A delta that is added in place and subtracted again (a merge and its unmerge) leaves the packed bytes as
  they were, and frees the dense values. See `nf4_state`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from .code_tables import BLOCKSIZES, WEIGHT_DTYPES
from .nf4_state import Addition, NF4State, fingerprint, warn_of_growth
from .read_only import has_views, read_only, written

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NF4State", "NF4Weight"]

ops = torch.ops.peft_kernels
aten = torch.ops.aten

# Reads that may hand back the weight itself. From a weight that is dense for good they give the ordinary
# tensor instead: an ordinary parameter's `data` may be assigned from it, which torch does not survive with a
# subclass on the right-hand side.
_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("to", "float", "half", "bfloat16", "double", "type_as"),
        *("cpu", "cuda", "contiguous", "detach"),
    )
)

# What torch computes from a storage, which the wrapper has not.
_STORAGE_READS = frozenset(
    getattr(torch.Tensor, name) for name in ["numpy", "__array__", "tolist", "__dlpack__"]
)

FROZEN = "NF4 weights are frozen; for full fine-tuning load the model without quantize_model"


class NF4Weight(torch.Tensor):
    """A (out_features, in_features) weight in 4-bit NormalFloat, optionally with double-quantised scales.

    The format is that of QLoRA (Dettmers et al. 2023, section 3) as bitsandbytes stores it, to the bit. Make
    one with `quantize`, `from_state_dict` or `from_bnb`. `dtype` is nominal: the type the weight had, and has
    again when it is dequantised; products are computed in the type of the activations.
    """

    _state: NF4State

    @staticmethod
    def __new__(cls, state: NF4State, dtype: torch.dtype) -> NF4Weight:
        some = next(iter(state.tensors().values()))
        self: NF4Weight = torch.Tensor._make_wrapper_subclass(
            cls, state.shape, dtype=dtype, device=some.device
        )
        self._state = state
        return self

    def __init__(self, state: NF4State, dtype: torch.dtype) -> None:
        pass

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        blocksize: int = 64,
        double_quant: bool = True,
        check_finite: bool = True,
        name: str = "weight",
    ) -> NF4Weight:
        """Quantise a dense weight.

        Parameters
        ----------
        weight : Tensor, (out_features, in_features)
            fp32, bf16 or fp16, on any device.
        blocksize : int
            Number of consecutive weights that share a scale: 32, 64, ..., 4096. Blocks run over the flat
            weight.
        double_quant : bool
            Quantise the scales too (4.127 bits a weight instead of 4.5 at blocksize 64).
        check_finite : bool
            Raise on NaN and Inf, which have no code.
        name : str
            What errors call the weight.

        Raises
        ------
        ValueError
            Wrong number of dimensions, dtype or blocksize; NaN or Inf in the weight.
        """
        if isinstance(weight, NF4Weight):
            weight = weight.dequantize()
        if weight.dim() != 2:
            raise ValueError(f"{name}: expected shape (out_features, in_features), got {tuple(weight.shape)}")
        if weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {weight.dtype}")
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
        packed, absmax = ops.quantize_nf4(weight.detach(), blocksize)
        if check_finite and not bool(torch.isfinite(absmax).all()):
            bad = int((~torch.isfinite(weight.detach())).sum())
            raise ValueError(f"{name}: expected finite values, got {bad} NaN or Inf among {weight.numel()}")
        shape = (weight.shape[0], weight.shape[1])
        state = NF4State(shape, blocksize, _rows(packed, shape), absmax, double_quant=double_quant, name=name)
        if double_quant:
            state.absmax, state.absmax2, state.offset = ops.quantize_absmax(absmax)
        return cls(state, weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in): `code * absmax` rounded once to `dtype`, by default its own."""
        dtype = dtype or self.dtype
        if self._state.dense is not None:
            return self._state.dense.to(dtype, copy=True)
        return self._state.dequantize(dtype)

    def requantize_(self) -> NF4Weight:
        """Pack a weight that a write made dense. Loses what 4 bits cannot hold; see `is_dense`."""
        state = self._state
        if state.dense is not None:
            packed = NF4Weight.quantize(state.dense.to(self.dtype), state.blocksize, state.double_quant)
            state.become(packed._state)
        return self

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Whatever is written inside, by assignment to `data` too, is a merge that `unmerging` takes back.

        A delta that is added in place needs neither. The packed bytes are kept aside. Not while the weight is
        dense for good. Nests: the last one to end counts.
        """
        kept = None if self._state.packed is None else self._state.packed_form()
        self._in_merge = getattr(self, "_in_merge", 0) + 1
        try:
            yield
        finally:
            self._in_merge -= 1
        state = self._state
        if kept is not None and state.dense is not None:
            state.keep(kept, fingerprint(state.dense))

    @contextmanager
    def unmerging(self) -> Iterator[None]:
        """All that `merging` left is taken off inside: the weight is then its packed bytes again.

        Unless it is no longer, to the bit, what `merging` left: then what is written inside stays, dense.
        """
        state = self._state
        kept = None
        if state.dense is not None and state.seal is not None and state.seal == fingerprint(state.dense):
            kept = state.packed_form()
        self._in_merge = getattr(self, "_in_merge", 0) + 1
        try:
            yield
        finally:
            self._in_merge -= 1
        if kept is not None:
            self._state.keep(kept, None)
            self._state.repack()

    @property
    def is_dense(self) -> bool:
        """Whether a write (a merge, say) has made the weight dense."""
        return self._state.dense is not None

    @property
    def is_merged(self) -> bool:
        """Whether it is dense for as long as a merge is in it: the packed bytes are kept aside."""
        return self._state.merged

    @property
    def packed(self) -> Tensor | None:
        """The 4-bit codes, two a byte, the first in the high half; None when dense."""
        return None if self.is_dense else self._state.packed

    @property
    def absmax(self) -> Tensor | None:
        """Scale of each block: fp32, or uint8 when double-quantised; None when dense."""
        return None if self.is_dense else self._state.absmax

    @property
    def absmax2(self) -> Tensor | None:
        """Second-level scales, fp32 (ceil(nblocks / 256),); None without double quantisation."""
        return None if self.is_dense else self._state.absmax2

    @property
    def offset(self) -> Tensor | None:
        """Mean of the scales, fp32 (); None without double quantisation."""
        return None if self.is_dense else self._state.offset

    @property
    def blocksize(self) -> int:
        return self._state.blocksize

    @property
    def double_quant(self) -> bool:
        return self._state.double_quant

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory, scales included."""
        return self._state.nbytes

    def nelement(self) -> int:
        """How many elements of `dtype` the bytes in memory come to: transformers' `get_memory_footprint`
        multiplies this by `element_size()`. The number of weights is `numel()`."""
        return -(-self.nbytes // self.element_size())

    def state_dict(self, prefix: str = "", name: str = "weight") -> dict[str, Tensor]:
        """Tensors to save, under bitsandbytes' keys (`weight`, `weight.absmax`, ...). Shares memory."""
        from .integrations import bitsandbytes

        return bitsandbytes.to_state_dict(self, prefix + name)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], prefix: str = "", name: str = "weight"
    ) -> NF4Weight:
        """Read what `state_dict` or bitsandbytes wrote. ValueError names an item that does not fit."""
        from .integrations import bitsandbytes

        return bitsandbytes.from_state_dict(state_dict, prefix + name)

    @classmethod
    def from_bnb(cls, params4bit: Any) -> NF4Weight:
        """Wrap a quantised `bitsandbytes.nn.Params4bit` of type nf4, sharing its memory.

        ValueError when it is not quantised yet, is fp4, or was repacked by bitsandbytes' CPU inference.
        """
        from .integrations import bitsandbytes

        return bitsandbytes.from_params4bit(params4bit)

    def to_bnb(self) -> Any:
        """The same weight as a `bitsandbytes.nn.Params4bit`, sharing memory."""
        from .integrations import bitsandbytes

        return bitsandbytes.to_params4bit(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = self._state
        form = "dense" if self.is_dense else f"blocksize={state.blocksize}, double_quant={state.double_quant}"
        return (
            f"NF4Weight({state.shape[0]}, {state.shape[1]}, dtype={self.dtype}, device={self.device}, {form})"
        )

    # How the tensor behaves in other people's hands.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._state, self.dtype, self.requires_grad, getattr(self, "_is_param", False))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        state = self._state
        names = ["dense"] if state.merged else list(state.tensors())
        return names, (state.shape, state.blocksize, state.double_quant, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], context: Any, size: Any, stride: Any) -> NF4Weight:
        shape, blocksize, double_quant, dtype = context
        return NF4Weight(NF4State(shape, blocksize, double_quant=double_quant, **inner), dtype)

    @property
    def dense(self) -> Tensor | None:
        """The weight (out, in) when a write has made it dense, else None."""
        return self._state.dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        handler = _FUNCTIONS.get(
            func
        )  # of setters each look-up makes a new method-wrapper: equal, not identical
        if handler is not None and isinstance(args[0], NF4Weight):
            return handler(func, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func, _on_dense)
        return handler(func, args, kwargs or {})


def _rows(packed: Tensor, shape: Any) -> Tensor:
    """Packed bytes as (out, in / 2), so that rows shard, when a row is a whole number of bytes."""
    return packed.view(shape[0], shape[1] // 2) if shape[1] % 2 == 0 else packed


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, NF4Weight) or not isinstance(weight, NF4Weight):
        # An NF4 activation or bias is nothing that a layer does; it is still only a tensor.
        dense = [t.dequantize() if isinstance(t, NF4Weight) else t for t in (input, weight)]
        return F.linear(dense[0], dense[1], bias)
    if weight.requires_grad:  # no parameter, but a copy to which something trained was added (SHiRA)
        return _plainly(F.linear, input, weight, bias)
    from .functional import nf4_linear

    return nf4_linear(input, weight, bias)


def _plainly(func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _assign_data(func: Any, self: NF4Weight, value: Tensor) -> None:
    """`self.data = value`. Torch asks the left side alone, so `self` is an NF4Weight."""
    old = self._state
    if isinstance(value, NF4Weight):
        cast = value.__dict__.get("_cast")
        if cast is not None and cast[0]() is old and value._state.packed is cast[1] and not value.is_dense:
            return  # `p.data = p.data.to(dtype)`, PEFT's kbit preparation: there are no 16 bits here to widen
    else:
        if tuple(value.shape) != old.shape:
            raise ValueError(f"data: expected shape {old.shape}, got {tuple(value.shape)}")
        packed = old.packed is not None
        state = NF4State(
            old.shape, old.blocksize, dense=value.detach(), double_quant=old.double_quant, name=old.name
        )
        if packed:
            warn_of_growth("merged" if getattr(self, "_in_merge", 0) else "for good", state)
        value = NF4Weight(state, value.dtype)
    _plainly(func, self, value)
    self._state = value._state


def _get_data(func: Any, self: NF4Weight) -> Tensor:
    if self.is_dense and not self.is_merged:
        return _plainly(func, self.dense)
    out: Tensor = _plainly(func, self)
    out.__dict__["_data_of"] = weakref.ref(self._state)
    return out


def _read(func: Any, self: NF4Weight, *args: Any, **kwargs: Any) -> Tensor:
    if self.is_dense and not self.is_merged:
        return _plainly(func, self.dense, *args, **kwargs)
    out: Tensor = _plainly(func, self, *args, **kwargs)
    source = self.__dict__.get("_data_of")
    if source is not None and isinstance(out, NF4Weight) and out is not self and out.device == self.device:
        out.__dict__["_cast"] = (source, out._state.packed)
    return out


def _read_storage(func: Any, self: NF4Weight, *args: Any, **kwargs: Any) -> Any:
    return func(self.dequantize(), *args, **kwargs)


def _set_requires_grad(func: Any, self: NF4Weight, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise ValueError(f"{self._state.name.removesuffix('.weight')}: {FROZEN}")
    return _plainly(func, self, requires_grad)


def _share_memory(func: Any, self: NF4Weight) -> NF4Weight:
    for tensor in self._state.tensors().values():
        tensor.share_memory_()
    return self


def _is_shared(func: Any, self: NF4Weight) -> bool:
    return all(tensor.is_shared() for tensor in self._state.tensors().values())


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_READS, _read),
    **dict.fromkeys(_STORAGE_READS, _read_storage),
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _assign_data,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    Tensor.requires_grad_: _set_requires_grad,
    Tensor.share_memory_: _share_memory,
    Tensor.is_shared: _is_shared,
}


def _rebuild(state: NF4State, dtype: torch.dtype, requires_grad: bool, is_param: bool) -> NF4Weight:
    weight = NF4Weight(state, dtype)
    if is_param:
        weight._is_param = True
    return weight


# For torch.load(weights_only=True): they hold tensors and numbers, and do nothing.
torch.serialization.add_safe_globals([_rebuild, NF4State, Addition])


def _dense(value: Any) -> Any:
    if not isinstance(value, NF4Weight):
        return value
    return value._state.dense if value.is_dense else value.dequantize()


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run any op on dense values: reads see a dequantised copy, writes make the weight dense first."""
    targets = [target for target in written(func, args, kwargs) if isinstance(target, NF4Weight)]
    if targets:
        return _write(func, args, kwargs, targets)
    dense_args, dense_kwargs = tree_map(_dense, (args, kwargs))
    out = func(*dense_args, **dense_kwargs)
    if has_views(func) and any(isinstance(a, NF4Weight) and a._state.packed is not None for a in args):
        return read_only(out)
    return out


def _write(func: Any, args: Any, kwargs: Any, targets: list[NF4Weight]) -> Any:
    first: Any = args[0] if args else None
    addition = _addition(func, args, kwargs)
    if addition is not None and first._state.subtracts_the_rest(addition):
        first._state.repack()
        return first
    before = [target._state.dense for target in targets]
    for target in targets:
        target._state.before_write(target.dtype)
    written_to = first._state.dense if isinstance(first, NF4Weight) else None
    dense_args, dense_kwargs = tree_map(_dense, (args, kwargs))
    try:
        out = func(*dense_args, **dense_kwargs)
    except BaseException:
        for target, dense in zip(targets, before, strict=True):
            target._state.dense = dense
        raise
    for target in targets:
        if addition is not None:
            target._state.added(addition)
        else:
            target._state.wrote()
    if isinstance(first, NF4Weight) and out is written_to:
        return first  # an in-place op returns the very argument that it wrote to
    return out


def _addition(func: Any, args: Any, kwargs: Any) -> Addition | None:
    """What an op adds to an NF4 weight in place, if that is all it does and can be taken back."""
    sign = _ADDS.get(func)
    if sign is None or not isinstance(args[0], NF4Weight) or args[0]._state.packed is None:
        return None
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    return Addition.of(_dense(args[1]), sign * alpha, args[0].dtype)


_ADDS = {
    aten.add_.Tensor: 1,
    aten.add_.Scalar: 1,
    aten.sub_.Tensor: -1,
    aten.sub_.Scalar: -1,
}


def _alias(func: Any, args: Any, kwargs: Any) -> Tensor:
    return NF4Weight(args[0]._state, args[0].dtype)


def _clone(func: Any, args: Any, kwargs: Any) -> Tensor:
    return NF4Weight(args[0]._state.map(torch.clone), args[0].dtype)


def _empty_like(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`nn.Module.to_empty`, which names a device, wants a weight that can be loaded into."""
    weight, device = args[0], kwargs.get("device")
    if device is None or weight.is_dense:
        return _on_dense(func, args, kwargs)
    return NF4Weight(weight._state.map(lambda t: torch.empty_like(t, device=device)), weight.dtype)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`.to()`: the bytes move between devices; a new dtype is a new nominal dtype."""
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if dtype not in WEIGHT_DTYPES:
        return _on_dense(func, args, kwargs)
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    state = weight._state.map(lambda t: t.to(device, non_blocking=non_blocking, copy=True))
    if state.dense is not None:
        state.dense = state.dense.to(dtype)
    return NF4Weight(state, dtype)


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if isinstance(target, NF4Weight) and isinstance(source, NF4Weight) and target.shape == source.shape:
        device = target.device
        target._state.become(source._state.map(lambda t: t.to(device, copy=True)))
        return target
    return _on_dense(func, args, kwargs)


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.empty_like.default: _empty_like,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}
