"""The format of an owner: the names of a weight's tensors, and how they become a PackedState and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.formats import FORMATS
from ...core.packed_state import PackedState, packed_rows

Config = Mapping[str, Any]

_PART = 1 << 24  # bytes of codes swapped at a time


class Owner(ABC):
    """The format of one owner.

    The tensors of a weight of a linear layer are named after its module, those of experts after the weight:
    that name and a part. Parts `beside` are kept aside: reading needs them at most for checks, saving writes
    them again.
    """

    method: ClassVar[str]
    """Its `quant_method` in config.json."""
    variant_key: ClassVar[str] = ""
    """The key of a configuration that tells its formats apart, if the method has several."""
    variants: ClassVar[tuple[str, ...]] = ()
    """Values of that key that name this format."""
    format: ClassVar[str]
    """Key of `core.formats.FORMATS`."""
    title: ClassVar[str]
    """The format in messages."""
    experts: ClassVar[bool] = False
    """Whether weights are those of experts, (experts, out, in), or of linear layers, (out, in), which may be
    those of experts that transformers merges into one weight."""
    codes: ClassVar[str]
    """The one of `parts` that the codes have."""
    any_code: ClassVar[bool] = True
    """Whether every byte is a valid code, so that checks need not read them."""
    parts: ClassVar[tuple[str, ...]]
    """Of the names of a weight's tensors."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Those of `parts` that a weight may lack."""
    marks: ClassVar[tuple[str, ...]]
    """Those of `parts` that only packed weights have."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Parts that are kept aside."""

    @property
    def blocksize(self) -> int:
        return FORMATS[self.format].blocksizes[0]

    def stem(self, weight: str) -> str:
        """What the names of a weight's tensors begin with."""
        return weight if self.experts else weight.removesuffix("weight")

    def weight_of(self, name: str) -> str | None:
        """The packed weight that a tensor marks by its name; None for others."""
        for mark in self.marks:
            stem = name.removesuffix(mark)
            if stem != name and stem and (self.experts or stem.endswith(".")):
                return stem if self.experts else f"{stem}weight"
        return None

    def weights(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The packed weights among the tensors of a checkpoint, with the names of their tensors."""
        names = dict.fromkeys(names)
        stems = {weight: self.stem(weight) for name in names if (weight := self.weight_of(name)) is not None}
        parts = (*self.parts, *self.beside)
        return {
            weight: [stem + part for part in parts if stem + part in names] for weight, stem in stems.items()
        }

    def part_of(self, weight: str, name: str) -> str:
        """The part in the name of a weight's tensor."""
        return name.removeprefix(self.stem(weight))

    def variant_of(self, config: Config) -> Any:
        """Which of the method's formats a configuration names."""
        return config.get(self.variant_key)

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raises ValueError for a `quantization_config` that cannot be read."""

    def unused(self, config: Config) -> str:
        """What a `quantization_config` says that has no effect here, for the log; else ""."""
        return ""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        """A weight, and its tensors to keep aside for `write`, by part.

        Parameters
        ----------
        tensors
            The weight's tensors by part.
        weight : str
            Its name in the file, for errors.

        Raises
        ------
        ValueError
            A tensor is missing, has another shape or dtype, or values that no weight has, such as NaN.
        """

    @abstractmethod
    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        """The tensors of a packed weight by name, as `read` took them. Raises ValueError for a weight that
        this format cannot hold."""

    @abstractmethod
    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        """A `quantization_config` that tells readers of modules that are dense now. Raises ValueError if it
        cannot."""


def tensor_of(tensors: Mapping[str, Tensor], stem: str, part: str, *dtypes: torch.dtype) -> Tensor:
    found, name = tensors.get(part), stem + part
    if found is None:
        raise missing(name)
    if found.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected dtype {expected}, got {found.dtype}")
    return found


def missing(name: str) -> ValueError:
    return ValueError(f"{name}: expected this tensor of a packed weight, got none")


def one_of(values: Sequence[Any]) -> str:
    """The values in a message: 'a', 'b' or 'c'."""
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}" if first else last


def kept(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named tensors, if there are any: of a mapped file, or of a GPU's memory, they would keep
    more than themselves."""
    found = {name: tensors[name] for name in names if name in tensors}
    return {n: t.clone() if t.is_meta else t.to("cpu", copy=True) for n, t in found.items()}


def expect_shape(name: str, expected: tuple[int | str, ...], got: Iterable[int]) -> None:
    got = tuple(got)
    fits = len(got) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, got, strict=True)
    )
    if not fits:
        shown = ", ".join(map(str, expected))
        raise ValueError(f"{name}: expected shape ({shown}), got {got}")


def state_of_codes(
    format: str, shape: tuple[int, ...], codes: Tensor, scales: Tensor, values: Tensor, weight: str
) -> PackedState:
    """The state of a weight in a format whose scales are codes.

    Parameters
    ----------
    shape
        (out, in), or (experts, out, in).
    codes : Tensor, uint8
        The first of two codes in the low nibble, as all owners have it.
    scales, values : Tensor
        uint8, a code for each block, and fp32 (256,), what they mean.
    """
    count = shape[:-2]
    return PackedState(
        shape,
        FORMATS[format].blocksizes[0],
        packed_rows(swapped(codes).view(*count, -1), shape),
        scales.contiguous().view(*count, -1),
        values.repeat(*count, 1) if count else values,
        double_quant=False,
        name=weight,
        format=format,
    )


def check_scales(name: str, scales: Tensor, values: Tensor) -> None:
    """Raises ValueError if a scale that occurs is not a number of 0 or more."""
    if scales.device.type == "meta":
        return
    counts = torch.bincount(scales.reshape(-1), minlength=256)
    bad = ~(values >= 0) | values.isinf()
    if int(counts[bad].sum()):
        raise ValueError(
            f"{name}: expected finite scales of 0 or more, got {int(counts[bad].sum())} NaN, Inf or negative "
            f"among {scales.numel()}"
        )


def check_finite(name: str, scales: Tensor) -> None:
    """Raises ValueError if a scale is not a number. Some quantisers make negative ones."""
    if scales.device.type == "meta":
        return
    bad = int((~scales.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: expected finite scales, got {bad} NaN or Inf among {scales.numel()}")


def swapped(codes: Tensor) -> Tensor:
    """A copy with the nibbles of each byte exchanged, made in parts, so that it is all that it takes."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    old, new = codes.reshape(-1), out.view(-1)
    for begin in range(0, old.numel(), _PART):
        part = old[begin : begin + _PART]
        torch.bitwise_or(part << 4, part >> 4, out=new[begin : begin + _PART])
    return out
