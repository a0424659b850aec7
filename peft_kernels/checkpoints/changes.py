"""What an adapter of PEFT makes of one tensor of its base, to the bit as `merge_and_unload` computes it.

PEFT loads adapters in fp32 and multiplies and adds in fp32; which sums it rounds twice depends on the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .header import Entry

ReadPart = Callable[[Entry], Tensor]
"""Reads a tensor of an adapter, in fp32."""


class Change(Protocol):
    """A merged tensor from the one of the base."""

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        """The merged tensor, of the shape and dtype of `weight`, which may have been written to."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA or DoRA on a whole weight."""

    a: Entry
    b: Entry
    scaling: float
    magnitude: Entry | None = None
    transposed: bool = False
    """Whether the weight is (in_features, out_features)."""
    rounded: bool = False
    """Whether PEFT rounds the delta to the weight's dtype before the sum is rounded: to embeddings and
    parameters it does."""

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        delta = read(self.b) @ read(self.a)
        delta = (delta.T if self.transposed else delta).mul_(self.scaling)
        if self.magnitude is None:
            return weight.add_(delta.to(weight.dtype) if self.rounded else delta)
        merged = weight + delta
        del delta
        norm = torch.linalg.norm(merged.T if self.transposed else merged, dim=1)
        factor = (read(self.magnitude).view(-1) / norm).view(-1, 1)
        return merged.mul_(factor.T if self.transposed else factor).to(weight.dtype)


@dataclass(frozen=True)
class ExpertRows:
    """LoRA on one expert of a weight of many, or some of its rows where the file has it in parts."""

    a: Entry
    """(experts * r, in_features)"""
    b: Entry
    """(out_features, r * experts), the expert the fastest index"""
    scaling: float
    experts: int
    expert: int
    transposed: bool
    """Whether the model has (in_features, out_features)."""
    start: int
    stop: int
    """Rows of the expert as the model has it."""

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        r = self.a.shape[0] // self.experts
        a = read(self.a)[self.expert * r : (self.expert + 1) * r]
        b = read(self.b).view(-1, r, self.experts)[:, :, self.expert]
        if self.transposed:
            a = a[:, self.start : self.stop]
        else:
            b = b[self.start : self.stop]
        delta = (b @ a).mul_(self.scaling)
        return weight.add_((delta.T if self.transposed else delta).to(weight.dtype))


@dataclass(frozen=True)
class AddedBias:
    """The bias of `lora_bias=True`."""

    bias: Entry
    scaling: float

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        return weight.add_(read(self.bias) * self.scaling)


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained as a whole: of `modules_to_save`, a bias, or resaved embeddings."""

    by: Entry

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        return weight.copy_(read(self.by))


@dataclass(frozen=True)
class Both:
    """One after the other."""

    first: Change
    second: Change

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        return self.second.of(self.first.of(weight, read), read)


@dataclass(frozen=True)
class Experts:
    """LoRA on a weight of many experts: a change for each of them."""

    a: Entry
    b: Entry
    scaling: float
    experts: int
    transposed: bool

    def of_expert(self, expert: int, start: int, stop: int) -> ExpertRows:
        """Of rows of one expert, as the model has it."""
        rest = self.experts, expert, self.transposed, start, stop
        return ExpertRows(self.a, self.b, self.scaling, *rest)
