"""The format of an owner: the names of a weight's tensors, and how they become an NF4State and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.formats import FORMATS
from ...core.nf4_state import NF4State, packed_rows

Config = Mapping[str, Any]

_PART = 1 << 24  # bytes of codes swapped at a time


class Owner(ABC):
    """The format of one owner.

    The tensors of a weight are named after it: its name and an ending, `""` among them. Others of its module
    are kept aside: reading ignores them, saving writes them again.
    """

    method: ClassVar[str]
    """Its `quant_method` in config.json."""
    format: ClassVar[str]
    """Key of `core.formats.FORMATS`."""
    title: ClassVar[str]
    """The format in messages."""
    experts: ClassVar[bool]
    """Whether weights are those of experts, (experts, out, in), or of linear layers, (out, in)."""
    codes: ClassVar[str]
    """The one of `endings` that the codes have."""
    endings: ClassVar[tuple[str, ...]]
    """Of the names of a weight's tensors."""
    marks: ClassVar[tuple[str, ...]]
    """Those of `endings` that only packed weights have."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of tensors of the module that are kept aside."""

    @property
    def blocksize(self) -> int:
        return FORMATS[self.format].blocksizes[0]

    def weight_of(self, name: str) -> str | None:
        """The packed weight that a tensor marks by its name; None for others."""
        for mark in self.marks:
            weight = name.removesuffix(mark)
            if weight not in ("", name) and (self.experts or weight.endswith(".weight")):
                return weight
        return None

    def tensors_of(self, weight: str, names: Container[str]) -> list[str]:
        """Those of `names` that belong to a packed weight."""
        module = weight.rpartition(".")[0]
        wanted = [
            *(weight + ending for ending in self.endings),
            *(f"{module}.{name}" for name in self.beside),
        ]
        return [name for name in wanted if name in names]

    def ending_of(self, weight: str, name: str) -> str:
        """The ending of the name of a weight's tensor; the last part of one beside it."""
        last = name.rpartition(".")[2]
        return last if last in self.beside else name.removeprefix(weight)

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raises ValueError for a `quantization_config` that cannot be read."""

    def unused(self, config: Config) -> str:
        """What a `quantization_config` says that has no effect here, for the log; else ""."""
        return ""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[NF4State, dict[str, Tensor]]:
        """A weight, and its tensors to keep aside for `write`, by ending or name.

        Parameters
        ----------
        tensors
            The weight's tensors by ending, and those beside it by name.
        weight : str
            Its name in the file, for errors.

        Raises
        ------
        ValueError
            A tensor is missing, has another shape or dtype, or scales that are no numbers of 0 or more.
        """

    @abstractmethod
    def write(self, state: NF4State, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        """The tensors of a packed weight by name, as `read` took them. Raises ValueError for a weight that
        this format cannot hold."""

    @abstractmethod
    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        """A `quantization_config` that tells readers of modules that are dense now. Raises ValueError if it
        cannot."""


def tensor_of(tensors: Mapping[str, Tensor], ending: str, weight: str, dtype: torch.dtype) -> Tensor:
    found, name = tensors.get(ending), weight + ending
    if found is None:
        raise ValueError(f"{name}: expected this tensor of a packed weight, got none")
    if found.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {found.dtype}")
    return found


def expect_shape(name: str, expected: tuple[int | str, ...], got: Iterable[int]) -> None:
    got = tuple(got)
    fits = len(got) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, got, strict=True)
    )
    if not fits:
        shown = ", ".join(map(str, expected))
        raise ValueError(f"{name}: expected shape ({shown}), got {got}")


def packed_state(
    format: str, shape: tuple[int, ...], codes: Tensor, scales: Tensor, values: Tensor, weight: str
) -> NF4State:
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
    return NF4State(
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


def swapped(codes: Tensor) -> Tensor:
    """A copy with the nibbles of each byte exchanged, made in parts, so that it is all that it takes."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    old, new = codes.reshape(-1), out.view(-1)
    for begin in range(0, old.numel(), _PART):
        part = old[begin : begin + _PART]
        torch.bitwise_or(part << 4, part >> 4, out=new[begin : begin + _PART])
    return out
