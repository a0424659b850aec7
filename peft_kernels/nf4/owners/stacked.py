"""Weights of experts that a file has as linear layers, one or two for each expert: joined into one packed
weight (experts, out, in), and taken apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.formats import FORMATS
from ...core.nf4_state import NF4State
from .owner import Owner


@dataclass
class Stacked:
    """How a weight of experts lies in a file."""

    target: str
    """What the weight's name ends with, and in the names of its layers is replaced by one of `sources`."""
    sources: list[str]
    """Names of an expert's layers, joined in this order, with * for the number of the expert."""
    rows: list[int]
    """Output features of these layers."""
    asides: list[list[dict[str, Tensor]]]
    """What `Owner.read` put aside of each expert's layers."""

    def write(self, state: NF4State, owner: Owner, weight: str) -> dict[str, Tensor]:
        """The tensors of all layers by name. Raises ValueError as `Owner.write`."""
        items: dict[str, Tensor] = {}
        for e, (parts, asides) in enumerate(zip(apart(state, self.rows), self.asides, strict=True)):
            for source, part, aside in zip(self.sources, parts, asides, strict=True):
                name = weight.removesuffix(self.target) + source.replace("*", str(e))
                items |= owner.write(part, aside, name)
        return items


def joined(experts: Iterable[list[NF4State]], count: int, name: str) -> NF4State:
    """One weight (count, out, in) of each expert's layers, whose rows follow each other.

    Raises ValueError if experts have layers of different shapes or blocks, or blocks would have rows of two
    layers.
    """
    whole, first = None, list[NF4State]()
    for e, parts in enumerate(experts):
        if whole is None:
            first = parts
            _check_rows(parts, name)
            whole = _empty(parts, count, name)
        assert whole.packed is not None and whole.absmax is not None
        row = scale = 0
        for part, other in zip(parts, first, strict=True):
            assert part.packed is not None and part.absmax is not None
            if (part.shape, part.blocksize) != (other.shape, other.blocksize):
                expected, got = (f"shape {one.shape} in {_blocks(one)}" for one in (other, part))
                raise ValueError(f"{part.name}: expected {expected}, as {other.name} has it, got {got}")
            rows, scales = part.shape[0], part.absmax.numel()
            whole.packed[e, row : row + rows] = part.packed
            whole.absmax[e, scale : scale + scales] = part.absmax
            row, scale = row + rows, scale + scales
    assert whole is not None
    return whole


def apart(state: NF4State, rows: list[int]) -> Iterator[list[NF4State]]:
    """The layers of each expert, in the weight's memory."""
    for e in range(state.shape[0]):
        one, parts, row, scale = state.expert(e), [], 0, 0
        assert one.packed is not None and one.absmax is not None
        for count in rows:
            shape = count, one.shape[1]
            scales = FORMATS[one.format].scales(shape, one.blocksize)
            packed, absmax = one.packed[row : row + count], one.absmax[scale : scale + scales]
            parts.append(dataclasses.replace(one, shape=shape, packed=packed, absmax=absmax))
            row, scale = row + count, scale + scales
        yield parts


def _check_rows(parts: list[NF4State], name: str) -> None:
    first = parts[0]
    for part in parts[1:]:
        if (part.shape[1], part.blocksize) != (first.shape[1], first.blocksize):
            expected, got = (f"{one.shape[1]} input features in {_blocks(one)}" for one in (first, part))
            raise ValueError(f"{part.name}: expected {expected}, as {first.name} has it, got {got}")
    for part in parts[:-1]:
        if part.blocksize and part.shape[0] % part.blocksize:
            raise ValueError(
                f"{part.name}: expected a multiple of {part.blocksize} output features, since {name} has its "
                f"rows and others, got {part.shape[0]}"
            )


def _empty(parts: list[NF4State], count: int, name: str) -> NF4State:
    some = parts[0].packed
    assert some is not None
    out = sum(part.shape[0] for part in parts)
    scales = sum(part.absmax.numel() for part in parts if part.absmax is not None)
    return dataclasses.replace(
        parts[0],
        shape=(count, out, parts[0].shape[1]),
        packed=some.new_empty((count, out, *some.shape[1:])),
        absmax=torch.empty((count, scales), dtype=torch.float32, device=some.device),
        name=name,
    )


def _blocks(state: NF4State) -> str:
    return f"blocks of {state.blocksize}" if state.blocksize else "whole rows"
