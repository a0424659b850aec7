"""NF4Weight: a 4-bit weight that looks like the ordinary tensor other people's code expects.

It sits in `nn.Linear.weight` as a frozen parameter. PEFT merges with `weight.data += delta`; accelerate,
`model.to()`, deepcopy and state_dict all look at `module.weight`: a tensor subclass lets them. Three rules
keep that honest:

- `F.linear(x, weight)` runs the NF4 kernel; any other read runs on a dequantised copy.
- A write makes the weight *dense*, for every alias of it: what is written is kept in full, never rounded back
  to 4 bits or lost with a temporary. `requantize_()` packs it again.
- A view of packed bytes as numbers cannot exist; asking for one raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .code_tables import BLOCKSIZES, WEIGHT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("peft_kernels")

ops = torch.ops.peft_kernels
aten = torch.ops.aten

_set_data = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_get_data = torch.Tensor.data.__get__  # type: ignore[attr-defined]

# Reads that may hand back the weight itself. From a dense weight they give the ordinary tensor instead: an
# ordinary parameter's `data` may be assigned from it, which torch does not survive with a subclass on the
# right-hand side.
_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "cpu",
        "cuda",
        "contiguous",
        "detach",
        "type_as",
    )
)


@dataclass
class NF4State:
    """The stored form of a weight, shared by all its aliases: `packed` and `absmax`, or else `dense`."""

    shape: tuple[int, int]
    blocksize: int
    packed: Tensor | None = None  # uint8 (out, in / 2), or ((n + 1) // 2,) when `in` is odd
    absmax: Tensor | None = None  # fp32 (nblocks,), or uint8 when double-quantised
    absmax2: Tensor | None = None  # fp32 (ceil(nblocks / 256),)
    offset: Tensor | None = None  # fp32 ()
    dense: Tensor | None = None  # (out, in), after a write
    double_quant: bool = True  # what requantize_() returns to

    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("packed", "absmax", "absmax2", "offset", "dense")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> NF4State:
        new = {name: function(tensor) for name, tensor in self.tensors().items()}
        return NF4State(self.shape, self.blocksize, double_quant=self.double_quant, **new)

    def become(self, other: NF4State) -> None:
        self.__dict__.update(other.__dict__)

    @property
    def op_args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """The argument group that ops take for a packed base weight."""
        assert self.packed is not None and self.absmax is not None
        return self.packed, self.absmax, self.absmax2, self.offset, self.blocksize


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
        state = NF4State(shape, blocksize, _rows(packed, shape), absmax, double_quant=double_quant)
        if double_quant:
            state.absmax, state.absmax2, state.offset = ops.quantize_absmax(absmax)
        return cls(state, weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in): `code * absmax` rounded once to `dtype`, by default its own."""
        dtype = dtype or self.dtype
        if self._state.dense is not None:
            return self._state.dense.to(dtype, copy=True)
        return ops.dequantize_nf4(*self._state.op_args, self._state.shape, dtype)

    def requantize_(self) -> NF4Weight:
        """Pack a weight that a write made dense. Loses what 4 bits cannot hold; see `is_dense`."""
        state = self._state
        if state.dense is not None:
            packed = NF4Weight.quantize(state.dense.to(self.dtype), state.blocksize, state.double_quant)
            state.become(packed._state)
        return self

    @property
    def is_dense(self) -> bool:
        """Whether a write (a merge, say) has made the weight dense."""
        return self._state.dense is not None

    @property
    def packed(self) -> Tensor | None:
        """The 4-bit codes, two a byte, the first in the high half; None when dense."""
        return self._state.packed

    @property
    def absmax(self) -> Tensor | None:
        """Scale of each block: fp32, or uint8 when double-quantised; None when dense."""
        return self._state.absmax

    @property
    def absmax2(self) -> Tensor | None:
        """Second-level scales, fp32 (ceil(nblocks / 256),); None without double quantisation."""
        return self._state.absmax2

    @property
    def offset(self) -> Tensor | None:
        """Mean of the scales, fp32 (); None without double quantisation."""
        return self._state.offset

    @property
    def blocksize(self) -> int:
        return self._state.blocksize

    @property
    def double_quant(self) -> bool:
        return self._state.double_quant

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory, scales included."""
        return sum(tensor.nbytes for tensor in self._state.tensors().values())

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

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        state = self._state
        return list(state.tensors()), (state.shape, state.blocksize, state.double_quant, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> NF4Weight:
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
        if func == _set_data:  # each look-up makes a new method-wrapper: equal, not identical
            return _assign_data(*args)
        if (func in _READS or func == _get_data) and isinstance(args[0], NF4Weight) and args[0].is_dense:
            args = (args[0].dense, *args[1:])
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
    from .functional import nf4_linear

    return nf4_linear(input, weight, bias)


def _assign_data(self: NF4Weight, value: Tensor) -> None:
    """`self.data = value`. Torch asks the left side alone, so `self` is an NF4Weight."""
    if not isinstance(value, NF4Weight):
        old = self._state
        if tuple(value.shape) != old.shape:
            raise ValueError(f"data: expected shape {old.shape}, got {tuple(value.shape)}")
        state = NF4State(old.shape, old.blocksize, dense=value.detach(), double_quant=old.double_quant)
        value = NF4Weight(state, value.dtype)
    with torch._C.DisableTorchFunctionSubclass():
        _set_data(self, value)
    self._state = value._state


def _materialize(weight: NF4Weight) -> None:
    state = weight._state
    if state.dense is None:
        logger.info(
            "an NF4 weight %s was written to and is dense from now on; requantize_() packs it", state.shape
        )
        state.become(
            NF4State(state.shape, state.blocksize, dense=weight.dequantize(), double_quant=state.double_quant)
        )


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run any op on dense values: reads see a dequantised copy, writes make the weight dense first."""
    schema = func._schema.arguments
    values = list(args) + [kwargs.get(argument.name) for argument in schema[len(args) :]]
    for argument, value in zip(schema, values, strict=True):
        if argument.alias_info is None:
            continue
        for weight in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(weight, NF4Weight):
                continue
            if argument.alias_info.is_write:
                _materialize(weight)
            elif not weight.is_dense:
                raise NotImplementedError(
                    f"{func}: an NF4 weight has no view of its numbers (writes to it would be lost); "
                    "use weight.dequantize() for a dense copy"
                )

    def unwrap(value: Any) -> Any:
        if not isinstance(value, NF4Weight):
            return value
        return value._state.dense if value.is_dense else value.dequantize()

    out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs))
    # An in-place op returns the very argument that it wrote to.
    if args and isinstance(args[0], NF4Weight) and func._schema.is_mutable and out is args[0]._state.dense:
        return args[0]
    return out


def _alias(func: Any, args: Any, kwargs: Any) -> Tensor:
    return NF4Weight(args[0]._state, args[0].dtype)


def _clone(func: Any, args: Any, kwargs: Any) -> Tensor:
    return NF4Weight(args[0]._state.map(torch.clone), args[0].dtype)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`.to()`: the bytes move between devices; a new dtype is a new nominal dtype."""
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if not dtype.is_floating_point:
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
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}
