"""Weights of experts in a model's files: finds their parts and assembles them.

Files store such a weight as one three-dimensional tensor, as a tensor per expert, or in another form that
transformers converts. Parts may be in several shards.
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
from ..nf4.experts_forward import weight_names
from .folder import Checkpoint
from .header import CheckpointError, Entry
from .names import Names


@dataclass
class ExpertsWeight:
    """One weight of an experts module in the files."""

    name: str
    """Name in the model."""
    shape: tuple[int, ...]
    """(experts, out_features, in_features)"""
    transposed: bool
    """Whether the model has (experts, in_features, out_features)."""
    model: Any
    """The model on the meta device."""
    parts: dict[str | None, list[Entry]] = field(default_factory=dict)
    """Parts in the order of experts, by pattern of their converter; None for the whole weight."""
    converter: Any = None
    written: Callable[[str], str] = str
    """Maps names of its items in the model to names in the files."""

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
        """Raises CheckpointError if parts are missing or do not fit. Reads no values."""
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
        """Yields the experts' weights, (out_features, in_features), one in memory at a time unless
        transformers converts the whole. Calls `seen` with each part that was read."""
        if self.converter is None:
            (entry,) = self.entries
            found: Iterator[Tensor] = (entry.row(e).read() for e in range(self.shape[0]))
            yield from self._oriented(found)
            seen(entry)
        elif self.merges:
            yield from self._oriented(self._merged(seen))
        else:
            whole = self._converted("cpu")
            for entry in self.entries:
                seen(entry)
            yield from self._oriented(iter(whole))

    @property
    def _in_model(self) -> tuple[int, ...]:
        experts, out, into = self.shape
        return (experts, into, out) if self.transposed else self.shape

    def _oriented(self, experts: Iterator[Tensor]) -> Iterator[Tensor]:
        return map(operator.attrgetter("mT"), experts) if self.transposed else experts

    @property
    def merges(self) -> bool:
        """Whether the conversion stacks experts, perhaps after concatenating parts of each."""
        from ..quantize.transformers.layouts import merges_experts

        return merges_experts(self.converter)

    def _merged(self, seen: Callable[[Entry], None]) -> Iterator[Tensor]:
        for entries in zip(*self.parts.values(), strict=True):
            yield entries[0].read() if len(entries) == 1 else torch.cat([entry.read() for entry in entries])
            for entry in entries:
                seen(entry)

    def _converted(self, device: str) -> Tensor:
        """The weight as transformers converts it. Raises CheckpointError if that yields several weights."""
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
        except Exception as error:  # operations of transformers may raise anything
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
    """The weights of experts modules of a meta model, by name. They may be incomplete, see
    `ExpertsWeight.check`."""
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
        if weight.converter is not None:  # the order of concatenation
            order = weight.converter.source_patterns
            weight.parts = {pattern: weight.parts[pattern] for pattern in order if pattern in weight.parts}
    return found


def _expect(name: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise CheckpointError(f"{name}: expected {what} {expected}, got {got}")
