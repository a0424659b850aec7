"""The state of a PackedWeight: packed bytes, or dense values, or dense values with the retained packed bytes.

The third form is a reversible merge. Adding a delta to a 4-bit weight and subtracting it again leaves
rounding errors, and a dense weight. So the state records what was added; once the same values have been
subtracted, the weight is its packed bytes again.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .fingerprint import fingerprint
from .formats import FORMATS
from .op import Base
from .registry import public_ops as ops

PARALLEL = "this process has a part of it, as a plan for tensor parallelism cuts it"
PACKED_FORM = ("packed", "absmax", "absmax2", "offset")

_ROUNDING = 4 * torch.finfo(torch.float32).eps  # coefficients of an average may add up to 1 inexactly
_MAX_ADDITIONS = 100  # more than any number of merges: then it is training

_warned: set[str] = set()
"""Kinds of growth that this process has warned of."""


@dataclass(frozen=True)
class Addition:
    """One delta that was added in place: `alpha` times values known by their fingerprints."""

    fingerprints: tuple[Any, ...]  # of the values as they came, and rounded to the weight's dtype
    alpha: float

    @classmethod
    def of(cls, value: Any, alpha: float, dtype: torch.dtype) -> Addition:
        both = [fingerprint(value)]
        if isinstance(value, Tensor) and value.dim() and value.dtype != dtype:
            both.append(fingerprint(value.to(dtype)))  # PEFT adds fp32 and subtracts what that is in bf16
        return cls(tuple(both), float(alpha))

    def undone_by(self, other: Addition) -> bool:
        return self.alpha == -other.alpha and other.fingerprints[0] in self.fingerprints


@dataclass(frozen=True)
class Share:
    """`factor` times the weight that `packed` holds."""

    shape: torch.Size
    packed: Mapping[str, Tensor | None]
    factor: Any  # a float, or a 0-dim tensor, read on the host only by `is_once`

    def times(self, factor: Any) -> Share:
        return Share(self.shape, self.packed, factor)

    def is_once(self, other: Share) -> bool:
        """Whether this is one times the weight that `other` is a multiple of."""
        return self.is_of(other) and abs(float(self.factor) - 1) <= _ROUNDING

    def is_of(self, other: Share) -> bool:
        """Whether both are multiples of one weight."""
        return self.shape == other.shape and all(
            _equal(mine, other.packed.get(name)) for name, mine in self.packed.items()
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    alike = a.device == b.device and a.dtype == b.dtype and a.shape == b.shape and not a.is_meta
    return alike and _same_bits(a, b)  # values of scale codes include NaN


@dataclass
class PackedState:
    """The stored form of a weight, shared by all its aliases.

    `packed` and `absmax` alone; or `dense` alone, after a write; or all of them while merged: `dense` is then
    the weight, and the packed form becomes it again when `additions` is empty.
    """

    shape: tuple[int, ...]  # (out, in); or (experts, out, in), and each tensor has experts first
    blocksize: int  # 0: a scale for each row
    packed: Tensor | None = None  # uint8 (out, in / 2), or ((n + 1) // 2,) when `in` is odd; bytes: (out, in)
    absmax: Tensor | None = None  # fp32 (nblocks,); uint8 codes of it; int4: fp16 or bf16
    absmax2: Tensor | None = None  # fp32 (ceil(nblocks / 256),), or (256,): values of the codes
    offset: Tensor | None = None  # fp32 () with double quantisation; int4: zero points, uint8 (nblocks,)
    dense: Tensor | None = None  # (out, in), after a write
    double_quant: bool = True  # whether requantize_() makes an offset
    name: str = "weight"  # in errors and warnings
    additions: list[Addition] = field(default_factory=list)
    seal: Any = None  # fingerprint of `dense` as PackedWeight.merging left it
    factor: Any = None  # `dense` is this times the packed form, while an average is computed in place
    part_of: str | None = None  # the weight that this is one expert of; then read-only
    gathered: bool = False  # by FSDP2, until it is freed; then read-only
    slice_of: tuple[int, ...] | None = None  # shape of the whole, where these are rows or columns of it
    format: str = "nf4"  # key of FORMATS

    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in (*PACKED_FORM, "dense")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedState:
        """A copy with other tensors, which is no longer part of a whole."""
        new = {name: function(tensor) for name, tensor in self.tensors().items()}
        changed: dict[str, Any] = {
            "additions": list(self.additions),
            "part_of": None,
            "gathered": False,
            **new,
        }
        return dataclasses.replace(self, **changed)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedState:
        return self.map(lambda tensor: copy.deepcopy(tensor, memo))

    def become(self, other: PackedState) -> None:
        """Takes over another state, except for the name."""
        self.__dict__.update(other.__dict__ | {"name": self.name})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def form(self) -> str:
        """Format and blocksize, for the representations of modules and weights."""
        format = "" if self.format == "nf4" else f"format={self.format}, "
        return f"{format}blocksize={self.blocksize}"

    @property
    def merged(self) -> bool:
        """Whether dense values lie over a retained packed form."""
        return self.dense is not None and self.packed is not None

    @property
    def op_args(self) -> Base:
        """The packed weight as ops take it."""
        assert self.packed is not None
        layout = FORMATS[self.format].layout(self.blocksize)
        return Base(self.packed, self.absmax, self.absmax2, self.offset, layout)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The packed values, ignoring dense values over them."""
        if len(self.shape) == 3:
            assert self.packed is not None
            all_experts = self.packed.new_empty(self.shape, dtype=dtype)
            for e in range(self.shape[0]):
                all_experts[e] = self.expert(e).dequantize(dtype)
            return all_experts
        dense: Tensor = ops.dequantize_nf4(*self.op_args, self.shape, dtype)
        return dense

    def expert(self, index: int) -> PackedState:
        """One expert's packed weight, in this one's memory."""
        if not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(f"index: expected one of {self.shape[0]} experts, got {index}")
        parts: dict[str, Any] = {n: None if t is None else t[index] for n, t in self.packed_form().items()}
        return dataclasses.replace(self, shape=self.shape[1:], part_of=self.name, **parts)

    def packed_form(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in PACKED_FORM}

    @property
    def share(self) -> Share | None:
        """The weight as a multiple of its packed form; None if it is none."""
        factor = self.factor if self.dense is not None else 1.0
        if self.packed is None or self.additions or self.seal is not None or factor is None or self.gathered:
            return None
        return self._once.times(factor)

    def holds(self, loaded: Tensor) -> bool:
        """Whether both are dense, with the same values."""
        values = loaded._state.dense if isinstance(loaded, HoldsPacked) else loaded
        if self.dense is None or values is None:
            return False
        return torch.equal(self.dense, values.to(self.dense))

    def keep(self, packed_form: dict[str, Tensor | None], seal: Any) -> None:
        """Retains a packed form beneath the dense values."""
        self.__dict__.update(packed_form)
        self.additions.clear()
        self.seal, self.factor = seal, None

    # A write is `before_write`, the write to `dense`, and one of the methods after it.

    def refuse_part(self) -> None:
        """Raises for a write to one expert, a slice or a tensor gathered by FSDP2, which would be lost."""
        if self.gathered:
            raise RuntimeError(
                f"{self.name}: gathered by FSDP2 for as long as its layer runs, and written to, expected "
                "writes (a merge, say) before fully_shard: this one would be lost"
            )
        if self.slice_of is not None:
            raise RuntimeError(
                f"{self.name}: {PARALLEL}, and was written to, expected writes (a merge, say) to a model in "
                "one process"
            )
        if self.part_of is not None:
            raise RuntimeError(
                f"{self.part_of}: one expert of it was written to, expected a write to the whole "
                "(as `weight += delta`): this one would be lost"
            )

    def refuse_saving_part(self) -> None:
        if self.slice_of is not None:
            raise RuntimeError(
                f"{self.name}: {PARALLEL}, and was to be saved, expected save_pretrained of the model, in "
                "every process and without distributed_checkpoint"
            )

    def before_write(self, dtype: torch.dtype) -> None:
        self.refuse_part()
        if self.dense is None:
            self.dense = self.dequantize(dtype)

    def subtracts_the_rest(self, addition: Addition) -> bool:
        """Whether adding `addition` leaves exactly the packed form, so that it need not be computed."""
        return len(self.additions) == 1 and self.additions[0].undone_by(addition)

    def repack(self) -> None:
        self.dense = self.seal = self.factor = None
        self.additions.clear()

    def is_once(self, share: Share | None) -> bool:
        """Whether a multiple is the packed form itself."""
        return self.packed is not None and share is not None and share.is_once(self._once)

    @property
    def _once(self) -> Share:
        return Share(torch.Size(self.shape), self.packed_form(), 1.0)

    def wrote_multiple(self, share: Share) -> None:
        """After a write of a multiple. A multiple of the packed form retains it: the next write may complete
        an average."""
        if self.packed is None or not share.is_of(self._once):
            return self.wrote()
        self.additions.clear()
        self.seal, self.factor = None, share.factor
        warn_of_growth("scaled", self)

    def added(self, addition: Addition) -> None:
        """After an addition, which is recorded or undoes an earlier one."""
        if self.packed is None:
            return
        self.seal = None
        for earlier in self.additions:
            if earlier.undone_by(addition):
                self.additions.remove(earlier)
                return
        if addition.alpha < 0 or self.factor is not None or len(self.additions) == _MAX_ADDITIONS:
            self.wrote()
        else:
            self.additions.append(addition)

    def merged_values(self) -> Tensor | None:
        """The dense values for a computation. Warns here and not in the merge: `merge_and_unload` leaves a
        dense layer, which its caller wants."""
        if self.merged and self.factor is None and not torch.compiler.is_compiling():
            warn_of_growth("merged", self)
        return self.dense

    def wrote(self) -> None:
        """After any other write: dense from now on, unless the packed form's values were written."""
        assert self.dense is not None
        if self.packed is None:
            return
        if _same_bits(self.dense, self.dequantize(self.dense.dtype)):
            self.repack()
        else:
            self.forget_packed()

    def forget_packed(self) -> None:
        for name in PACKED_FORM:
            setattr(self, name, None)
        self.additions.clear()
        self.seal = self.factor = None
        warn_of_growth("for good", self)


class HoldsPacked(torch.Tensor):
    """A tensor whose values are a PackedState."""

    _state: PackedState

    def _share(self) -> Share | None:
        return self._state.share


def packed_rows(packed: Tensor, shape: Any, bits: int = 4) -> Tensor:
    """Packed bytes as (out, in / 2), or (out, in) with a byte a code, which shards by rows, if a row is whole
    bytes; else flat. For 3-d shapes one per expert."""
    if shape[-1] * bits % 8 == 0:
        return packed.view(*shape[:-1], shape[-1] * bits // 8)
    return packed if len(shape) == 2 else packed.view(shape[0], -1)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def warn_of_growth(kind: str, state: PackedState) -> None:
    """Warns, once per process and kind, that 4-bit weights have become larger, and by how much."""
    if kind in _warned:
        return
    _warned.add(kind)
    assert state.dense is not None
    numel = prod(state.shape)
    why = {
        "merged": "while adapters are merged into it: dense, with its 4 bits kept aside until it is unmerged",
        "scaled": "while it is scaled: dense, with its 4 bits kept aside until an average gives them back",
        "for good": "from now on: it was written to by something other than a reversible merge "
        "(PiSSA, OLoRA, a merge that assigns); requantize_() packs it, with the loss of 4 bits",
    }[kind]
    warnings.warn(
        f"{state.name}: {state.nbytes / numel:.3g} bytes for each value of an {state.format.upper()} weight "
        f"instead of about {FORMATS[state.format].bytes_per_value(state.blocksize):.2g} "
        f"({state.nbytes / 1e6:.3g} MB in all) {why}. The same holds for "
        "every such layer; this warning is shown once.",
        stacklevel=2,
    )
