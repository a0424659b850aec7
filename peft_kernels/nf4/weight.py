"""PackedWeight: a quantised weight as a tensor subclass that works with code for ordinary tensors.

It is a frozen parameter in `nn.Linear.weight`, so PEFT's `weight.data += delta`, accelerate, `model.to()`,
deepcopy and state_dict work on it. Four rules:

- `F.linear(x, weight)` runs the NF4 kernel; any other read uses a dequantised copy. Views of that copy are
  read-only, since a write to them would be lost.
- A write makes the weight *dense*, for all its aliases: written values are kept exactly, not rounded to 4
  bits. `requantize_()` packs it again.
- A delta that is added in place and subtracted again (merge and unmerge) restores the packed bytes and frees
  the dense values. See `core.packed_state`.
- An average of a weight with itself (SWA, EMA) is the packed weight.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.code_tables import WEIGHT_DTYPES
from ..core.fingerprint import fingerprint
from ..core.formats import FORMATS, check_form
from ..core.packed_state import Addition, PackedState, packed_rows
from ..core.wrong_types import names_wrong_types
from . import bitsandbytes_format, packed_format, quantizing
from .tensor import PackedTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NF4Weight", "PackedState", "PackedWeight"]


class PackedWeight(PackedTensor):
    """A packed weight (out_features, in_features), in 4-bit NormalFloat or another of `core.formats`; or one
    for each of many experts, (experts, out_features, in_features).

    NF4 is that of QLoRA (Dettmers et al. 2023, section 3), bit-identical to bitsandbytes. Create a weight
    with `quantize`, `from_state_dict` or `from_bnb`. `dtype` is nominal: the dtype of the dense weight;
    matmuls are computed in the dtype of the activations.

    Experts are quantised one by one: no block or scale is shared, and `weight[i]` is the PackedWeight of one
    expert, sharing memory and read-only.
    """

    @classmethod
    @names_wrong_types
    def quantize(
        cls,
        weight: Tensor,
        blocksize: int | None = None,
        double_quant: bool = True,
        check_finite: bool = True,
        name: str = "weight",
        format: str = "nf4",
    ) -> PackedWeight:
        """Quantise a dense weight.

        Parameters
        ----------
        weight : Tensor, (out_features, in_features) or (experts, out_features, in_features)
            fp32, bf16 or fp16, on any device. On the meta device the result is an empty weight for
            `load_state_dict(assign=True)`.
        blocksize : int, optional
            Number of consecutive values that share a scale: 32, 64 (the default), ..., 4096 for NF4, FP4 and
            int4, 32 for MXFP4, 16 for NVFP4. Blocks of NF4 and FP4 run over the flat weight. FP8: 128
            for a scale for 128 x 128 values (the default), 0 for a scale for each row. int8: 64 or 128 (the
            default) columns of a row, or 0.
        double_quant : bool
            Quantise the scales of NF4 and FP4 too (4.127 bits per value instead of 4.5 at blocksize 64). Of
            int4, give each block a zero point.
        check_finite : bool
            Raise on NaN and Inf, which have no code.
        name : str
            Name of the weight in errors.
        format : str
            "nf4", "fp4" (bitsandbytes'), "mxfp4", "nvfp4", "int4", "fp8" or "int8".

        Raises
        ------
        ValueError
            Wrong number of dimensions, dtype, format or blocksize; NaN or Inf in the weight; rows that are
            not whole blocks in MXFP4, NVFP4 or int4.
        """
        if isinstance(weight, PackedWeight):
            weight = weight.dequantize()
        if weight.dim() not in (2, 3):
            expected = "(out_features, in_features) or (experts, out_features, in_features)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(weight.shape)}")
        if weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {weight.dtype}")
        blocksize = check_form(format, blocksize, weight.shape[-1], name)
        double_quant = double_quant and FORMATS[format].takes_double_quant
        if weight.dim() == 3:
            if weight.shape[0] == 0:
                raise ValueError(f"{name}: expected at least one expert, got shape {tuple(weight.shape)}")
            rest = blocksize, double_quant, check_finite, name, format
            return cls.quantize_experts(weight, weight.shape[0], *rest)
        checked = name if check_finite and not weight.is_meta else None
        parts = quantizing.quantize(weight.detach(), format, blocksize, double_quant, checked)
        packed, absmax, absmax2, offset = parts
        shape = (weight.shape[0], weight.shape[1])
        state = PackedState(shape, blocksize, packed_rows(packed, shape, FORMATS[format].bits))
        state.absmax, state.absmax2, state.offset = absmax, absmax2, offset
        state.double_quant, state.name, state.format = double_quant, name, format
        return cls(state, weight.dtype)

    @classmethod
    @names_wrong_types
    def quantize_experts(
        cls,
        experts: Iterable[Tensor],
        count: int,
        blocksize: int | None = None,
        double_quant: bool = True,
        check_finite: bool = True,
        name: str = "weight",
        format: str = "nf4",
    ) -> PackedWeight:
        """`quantize` for `count` weights of equal shape (out_features, in_features), one at a time, so that
        they need not all be in memory. Errors name the expert."""
        state, dtype = None, torch.float32
        for e, dense in enumerate(experts):
            one = cls.quantize(dense, blocksize, double_quant, check_finite, f"{name}[{e}]", format)._state
            if state is None:
                wide = one.map(lambda t: t.new_empty((count, *t.shape)))
                state, dtype = dataclasses.replace(wide, shape=(count, *dense.shape), name=name), dense.dtype
            for whole, part in zip(state.tensors().values(), one.tensors().values(), strict=True):
                whole[e] = part
        if state is None:
            raise ValueError(f"{name}: expected at least one expert, got none")
        return cls(state, dtype)

    def requantize_(self) -> PackedWeight:
        """Packs a dense weight again, which rounds its values to 4 bits."""
        state = self._state
        if state.dense is not None:
            dense = state.dense.to(self.dtype)
            packed = PackedWeight.quantize(
                dense, state.blocksize, state.double_quant, name=state.name, format=state.format
            )
            state.become(packed._state)
        return self

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Context in which writes, also by assignment to `data`, are a merge that `unmerging` undoes.

        Not needed for a delta that is added in place. The packed bytes are kept. Has no effect on a
        permanently dense weight. Can be nested; the outermost counts."""
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
        """Context that removes the merge of `merging`: the weight is its packed bytes again at the end.

        If the weight changed since `merging`, values written inside stay, dense.
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
    def packed(self) -> Tensor | None:
        """The codes, uint8: two per byte, the first in the high nibble; FP8 and int8: one. None if dense."""
        return None if self.is_dense else self._state.packed

    @property
    def absmax(self) -> Tensor | None:
        """Scale of each block: fp32; uint8 codes with double quantisation and in MXFP4 and NVFP4; fp16 or
        bf16 in int4. None if dense."""
        return None if self.is_dense else self._state.absmax

    @property
    def absmax2(self) -> Tensor | None:
        """Second-level scales of double quantisation, fp32 (ceil(nblocks / 256),); in MXFP4 and NVFP4 the
        values of the codes in `absmax`, fp32 (256,). None otherwise."""
        return None if self.is_dense else self._state.absmax2

    @property
    def offset(self) -> Tensor | None:
        """Mean of the scales with double quantisation, fp32 (); in int4 zero points, uint8 (nblocks,). None
        otherwise."""
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
        """`nbytes / element_size()`, rounded up, for transformers' `get_memory_footprint`. The number of
        values is `numel()`."""
        return -(-self.nbytes // self.element_size())

    def state_dict(self, prefix: str = "", name: str = "weight") -> dict[str, Tensor]:
        """Tensors to save under bitsandbytes' keys (`weight`, `weight.absmax`, ...), or for experts those of
        `packed_format`. Shares memory."""
        self._state.refuse_saving_part()
        form = packed_format if packed_format.holds(self._state) else bitsandbytes_format
        return form.to_state_dict(self._state, self.dtype, prefix + name)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], prefix: str = "", name: str = "weight"
    ) -> PackedWeight:
        """Reads tensors that `state_dict` or bitsandbytes wrote. Raises ValueError for items that do not
        fit."""
        return cls(*packed_format.read(state_dict, prefix + name))

    @classmethod
    def from_bnb(cls, params4bit: Any) -> PackedWeight:
        """Wraps a quantised `bitsandbytes.nn.Params4bit` of type nf4, sharing its memory.

        Raises ValueError if it is not quantised yet, is fp4, or was repacked by bitsandbytes' CPU inference.
        """
        return cls(bitsandbytes_format.state_of(params4bit), params4bit.quant_state.dtype)

    def to_bnb(self) -> Any:
        """The same weight as a `bitsandbytes.nn.Params4bit`, sharing memory."""
        return bitsandbytes_format.to_params4bit(self._state, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = self._state
        form = "dense"
        if not self.is_dense:
            form = f"{state.form}, double_quant={state.double_quant}"
        shape = ", ".join(map(str, state.shape))
        name = "NF4Weight" if state.format == "nf4" else "PackedWeight"
        return f"{name}({shape}, dtype={self.dtype}, device={self.device}, {form})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self._state
        if state.part_of is not None or state.gathered:  # a copied expert is independent
            state = dataclasses.replace(state, part_of=None, gathered=False)
        return _rebuild, (state, self.dtype, self.requires_grad, getattr(self, "_is_param", False))

    # torch reads these by the names of __tensor_flatten__, in compiled code too. The getters are in C: torch
    # 2.9 compiles one in Python, which then calls itself.
    _packed, _absmax, _absmax2, _offset, _dense = (
        property(attrgetter(f"_state.{name}")) for name in ("packed", "absmax", "absmax2", "offset", "dense")
    )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        state = self._state
        if "torch.distributed.pipelining" in sys.modules:
            _refuse_pipeline(state.name, sys._getframe(1))
        names = ["dense"] if state.merged else list(state.tensors())
        context = state.shape, state.blocksize, state.double_quant, state.format, self.dtype
        return [f"_{name}" for name in names], context

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], context: Any, size: Any, stride: Any) -> PackedWeight:
        shape, blocksize, double_quant, format, dtype = context
        parts = {name.removeprefix("_"): tensor for name, tensor in inner.items()}
        state = PackedState(shape, blocksize, double_quant=double_quant, format=format, **parts)
        return PackedWeight(state, dtype)


NF4Weight = PackedWeight
"""The name that users of NF4 know."""


def _refuse_pipeline(name: str, caller: FrameType | None) -> None:
    """Raises RuntimeError inside torch's `pipeline()`, which cannot split an exported graph with packed
    weights."""
    while caller is not None:
        if caller.f_code.co_name == "_trace_with_export":
            raise RuntimeError(
                f"{name}: expected stages made by hand, PipelineStage(module, ...), got pipeline(), which "
                "splits a traced graph, which fails with packed weights"
            )
        caller = caller.f_back


def _rebuild(state: PackedState, dtype: torch.dtype, requires_grad: bool, is_param: bool) -> PackedWeight:
    weight = PackedWeight(state, dtype)
    if is_param:
        weight._is_param = True
    return weight


# For torch.load(weights_only=True): plain containers of tensors and numbers.
torch.serialization.add_safe_globals([_rebuild, PackedState, Addition])
