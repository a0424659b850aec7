"""Weights of experts in a model's files: where the parts of each are, and how they become one.

A file has a weight of many experts whole, as a tensor of three dimensions, or each expert's apart, or in some
form that transformers converts. Its parts may lie in several shards.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.code_tables import WEIGHT_DTYPES
from ..nf4.experts_packing import weight_names
from .folder import Checkpoint
from .header import CheckpointError, Entry
from .names import Names


@dataclass
class ExpertsWeight:
    """One weight of a module of experts, as it is in the files."""

    name: str
    """In the model."""
    shape: tuple[int, ...]
    """(experts, out_features, in_features)"""
    transposed: bool
    """Whether the model has (experts, in_features, out_features)."""
    model: Any
    """On the meta device."""
    parts: dict[str | None, list[Entry]] = field(default_factory=dict)
    """By the pattern of the converter that takes them, in the order of experts; None: the weight, whole."""
    converter: Any = None
    written: Callable[[str], str] = str
    """From the names of its items in the model to what files call them."""

    @property
    def entries(self) -> list[Entry]:
        return [entry for entries in self.parts.values() for entry in entries]

    @property
    def dtype(self) -> torch.dtype:
        return self.entries[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def check(self) -> None:
        """CheckpointError if parts are missing, or do not fit the model or each other. Reads nothing."""
        if not self.parts:
            raise CheckpointError(f"{self.name}: expected its experts in the checkpoint, got no such tensors")
        if None in self.parts and len(self.entries) > 1:
            both = " and ".join(entry.name for entry in self.entries[:2])
            raise CheckpointError(f"{self.name}: expected one tensor, or its parts, got {both}")
        for entry in self.entries:
            if entry.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{entry.name}: expected float32, bfloat16 or float16, got {entry.dtype}"
                )
            _expect(entry.name, "dtype", self.dtype, entry.dtype)
        experts, *one = self._in_model
        if self.converter is None:
            (entry,) = self.entries
            _expect(entry.name, "shape", self._in_model, entry.shape)
        elif self.merges:
            for pattern, entries in self.parts.items():
                if len(entries) != experts:
                    what = f"{experts} experts as {pattern}"
                    raise CheckpointError(f"{self.name}: expected {what}, got {len(entries)}")
                for entry in entries:
                    _expect(entry.name, "shape", entries[0].shape, entry.shape)
            rows = sum(entries[0].shape[0] for entries in self.parts.values() if entries[0].shape)
            _expect(self.name, "shape of an expert", tuple(one), (rows, *self.entries[0].shape[1:]))
        else:
            _expect(self.name, "shape", self._in_model, tuple(self._converted("meta").shape))

    def experts(self, seen: Callable[[Entry], None]) -> Iterator[Tensor]:
        """The weight of one expert after the other, (out_features, in_features); no two are in memory, unless
        transformers converts the whole. `seen` is told of each part that has been read."""
        if self.converter is None:
            (entry,) = self.entries
            found: Iterator[Tensor] = (entry.row(e).read() for e in range(self.shape[0]))
            yield from self._turned(found)
            seen(entry)
        elif self.merges:
            yield from self._turned(self._merged(seen))
        else:
            whole = self._converted("cpu")
            for entry in self.entries:
                seen(entry)
            yield from self._turned(iter(whole))

    @property
    def _in_model(self) -> tuple[int, ...]:
        experts, out, into = self.shape
        return (experts, into, out) if self.transposed else self.shape

    def _turned(self, experts: Iterator[Tensor]) -> Iterator[Tensor]:
        return map(operator.attrgetter("mT"), experts) if self.transposed else experts

    @property
    def merges(self) -> bool:
        """Whether the conversion is: experts on top of each other, in each one part below the other."""
        from ..quantize.transformers.layouts import merges_experts

        return merges_experts(self.converter)

    def _merged(self, seen: Callable[[Entry], None]) -> Iterator[Tensor]:
        for entries in zip(*self.parts.values(), strict=True):
            yield entries[0].read() if len(entries) == 1 else torch.cat([entry.read() for entry in entries])
            for entry in entries:
                seen(entry)

    def _converted(self, device: str) -> Tensor:
        """As transformers makes it of its parts. CheckpointError for what it makes several weights of."""
        converter = copy.deepcopy(self.converter)
        for pattern, entries in self.parts.items():
            for entry in entries:
                empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                part = empty if device == "meta" else entry.read()
                converter.add_tensor(self.name, entry.name, pattern, part)
        kinds = " and ".join(type(operation).__name__ for operation in converter.operations)
        what = f"{self.name}: expected experts that can be packed by themselves"
        try:
            found = converter.convert(self.name, model=self.model, config=self.model.config)
        except Exception as error:  # an operation of transformers may need or raise anything
            raise CheckpointError(f"{what}, got ones that transformers converts by {kinds}") from error
        if found.keys() != {self.name}:
            others = f"{len(found) - 1} other weight{'' if len(found) == 2 else 's'}"
            raise CheckpointError(f"{what}, got ones that {kinds} makes together with {others}")
        (value,) = found.values()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor


def find(
    checkpoint: Checkpoint, model: Any, modules: dict[str, Any], names: Names
) -> dict[str, ExpertsWeight]:
    """The weights of some modules of experts of a model on the meta device, by their names in it. `check`
    tells whether one is all there."""
    found: dict[str, ExpertsWeight] = {}
    for module_name, module in modules.items():
        for key in weight_names(module):
            experts, *one = module._parameters[key].shape
            shape = (experts, *(reversed(one) if module.is_transposed else one))
            name = f"{module_name}.{key}"
            found[name] = ExpertsWeight(name, shape, module.is_transposed, model, written=names.written)
    for name in sorted(checkpoint.entries, key=names.order):
        target, pattern = names.in_model(name)
        weight = found.get(target)
        if weight is not None:
            weight.converter = None if pattern is None else names.converter(pattern)
            weight.parts.setdefault(pattern, []).append(checkpoint.entries[name])
    for weight in found.values():
        if weight.converter is not None:  # which part is above another is for its patterns to say
            order = weight.converter.source_patterns
            weight.parts = {pattern: weight.parts[pattern] for pattern in order if pattern in weight.parts}
    return found


def _expect(name: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise CheckpointError(f"{name}: expected {what} {expected}, got {got}")
