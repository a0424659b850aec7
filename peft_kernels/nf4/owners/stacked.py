"""Weights of experts that a file has as linear layers, one or two for each expert: joined into one packed
weight (experts, out, in), and taken apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.code_tables import ZERO_POINT
from ...core.formats import FORMATS
from ...core.packed_state import PackedState
from .owner import Owner
from .scale_tables import joined_tables, own_table


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
    """What `Owner.read` put aside of each expert's layers; tensors that are equal may be the same."""

    def write(self, state: PackedState, owner: Owner, weight: str) -> dict[str, Tensor]:
        """The tensors of all layers by name. Raises ValueError as `Owner.write`."""
        items: dict[str, Tensor] = {}
        for e, (parts, asides) in enumerate(zip(apart(state, self.rows), self.asides, strict=True)):
            for source, part, aside in zip(self.sources, parts, asides, strict=True):
                name = weight.removesuffix(self.target) + source.replace("*", str(e))
                own = {part_name: tensor.clone() for part_name, tensor in aside.items()}
                items |= owner.write(part, own, name)
        return items


def joined(experts: Iterable[list[PackedState]], count: int, name: str) -> PackedState:
    """One weight (count, out, in) of each expert's layers, whose rows follow each other.

    Raises ValueError if experts have layers of different shapes, blocks or dtypes of scales, or blocks would
    have rows of two layers.
    """
    whole, first = None, list[PackedState]()
    for e, parts in enumerate(experts):
        if whole is None:
            first = parts
            _check_rows(parts, name)
            whole = _empty(parts, count, name)
        for part, other in zip(parts, first, strict=True):
            if part.shape != other.shape or _form(part) != _form(other):
                expected, got = (f"shape {one.shape} in {_form(one)}" for one in (other, part))
                raise ValueError(f"{part.name}: expected {expected}, as {other.name} has it, got {got}")
        _fill(whole, e, parts)
    assert whole is not None
    return whole


def apart(state: PackedState, rows: list[int]) -> Iterator[list[PackedState]]:
    """The layers of each expert, in the weight's memory, except for scales that another table had."""
    form = FORMATS[state.format]
    for e in range(state.shape[0]):
        one, parts, row, scale = state.expert(e), list[PackedState](), 0, 0
        assert one.packed is not None and one.absmax is not None
        for count in rows:
            shape = count, one.shape[1]
            end = scale + form.scales(shape, one.blocksize)
            offset = None if one.offset is None else one.offset[scale:end]
            packed, absmax = one.packed[row : row + count], one.absmax[scale:end]
            part = dataclasses.replace(one, shape=shape, packed=packed, absmax=absmax, offset=offset)
            parts.append(own_table(part) if form.scale == "e4m3" else part)
            row, scale = row + count, end
        yield parts


def _fill(whole: PackedState, expert: int, parts: list[PackedState]) -> None:
    assert whole.packed is not None and whole.absmax is not None
    scales = [part.absmax for part in parts if part.absmax is not None]
    if whole.absmax2 is not None:
        scales, whole.absmax2[expert] = joined_tables(parts)
    row = begin = 0
    for part, new in zip(parts, scales, strict=True):
        assert part.packed is not None
        end = begin + new.numel()
        whole.packed[expert, row : row + part.shape[0]] = part.packed
        whole.absmax[expert, begin:end] = new
        if part.offset is not None:
            if whole.offset is None:  # those of layers that need none are all alike
                whole.offset = torch.full_like(whole.absmax, ZERO_POINT, dtype=torch.uint8)
                whole.double_quant = True
            whole.offset[expert, begin:end] = part.offset
        row, begin = row + part.shape[0], end


def _check_rows(parts: list[PackedState], name: str) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1] or _form(part) != _form(first):
            expected, got = (f"{one.shape[1]} input features in {_form(one)}" for one in (first, part))
            raise ValueError(f"{part.name}: expected {expected}, as {first.name} has it, got {got}")
    for part in parts[:-1]:
        if FORMATS[part.format].is_square and part.blocksize and part.shape[0] % part.blocksize:
            raise ValueError(
                f"{part.name}: expected a multiple of {part.blocksize} output features, since {name} has its "
                f"rows and others, got {part.shape[0]}"
            )


def _empty(parts: list[PackedState], count: int, name: str) -> PackedState:
    some = parts[0]
    assert some.packed is not None and some.absmax is not None
    out = sum(part.shape[0] for part in parts)
    scales = sum(part.absmax.numel() for part in parts if part.absmax is not None)
    return dataclasses.replace(
        some,
        shape=(count, out, some.shape[1]),
        packed=some.packed.new_empty((count, out, *some.packed.shape[1:])),
        absmax=some.absmax.new_empty((count, scales)),
        absmax2=None if some.absmax2 is None else some.absmax2.new_empty((count, *some.absmax2.shape)),
        offset=None,
        double_quant=False,
        name=name,
    )


def _form(state: PackedState) -> str:
    """What layers must have in common, for comparisons and messages."""
    blocks = f"blocks of {state.blocksize}" if state.blocksize else "whole rows"
    half = FORMATS[state.format].scale == "half"
    return f"{blocks} with scales in {state.absmax.dtype}" if half and state.absmax is not None else blocks
