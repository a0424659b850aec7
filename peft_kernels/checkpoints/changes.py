"""Changes of a base tensor by an adapter, bit-identical to PEFT's `merge_and_unload`.

PEFT loads adapters in fp32 and computes in fp32; whether it rounds the delta before the sum depends on the
layer.
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
    """A function from a tensor of the base to the merged tensor."""

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        """The merged tensor, of the shape and dtype of `weight`, which may be overwritten."""
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
    """Whether PEFT rounds the delta to the weight's dtype before adding it, as for embeddings and
    parameters."""

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
    """LoRA on one expert, or on some of its rows if the file stores it in parts."""

    a: Entry
    """(experts * r, in_features)"""
    b: Entry
    """(out_features, r * experts), with the expert as the fastest index"""
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
    """A tensor that replaces the base's: of `modules_to_save`, a bias, or saved embeddings."""

    by: Entry

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        return weight.copy_(read(self.by))


@dataclass(frozen=True)
class Both:
    """Two changes in order."""

    first: Change
    second: Change

    def of(self, weight: Tensor, read: ReadPart) -> Tensor:
        return self.second.of(self.first.of(weight, read), read)


@dataclass(frozen=True)
class Experts:
    """LoRA on a weight of many experts."""

    a: Entry
    b: Entry
    scaling: float
    experts: int
    transposed: bool

    def of_expert(self, expert: int, start: int, stop: int) -> ExpertRows:
        """The change of rows of one expert in the model's layout."""
        rest = self.experts, expert, self.transposed, start, stop
        return ExpertRows(self.a, self.b, self.scaling, *rest)
