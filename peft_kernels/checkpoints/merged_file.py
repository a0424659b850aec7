"""The files of a merged model, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import sqrt
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from ..core.formats import FORMATS
from ..core.packed_state import PackedState
from ..nf4 import packed_format
from ..nf4.owners.stacked import joined
from ..nf4.weight import PackedWeight
from .changes import Change, Experts, ReadPart
from .checks import finite_pieces, read_nf4
from .folder import Checkpoint
from .header import CheckpointError, Entry, shown
from .lora_folder import read_finite
from .merge_plan import Plan
from .owned import checkpoint_errors
from .owned_entries import PackedEntry
from .rows import read_layout
from .writer import Layout, ShardWriter, file_size

Progress = Callable[[str, int], None]
"""Called with the name and bytes of each tensor of the base."""


@dataclass
class Rounding:
    """Error of repacking changed weights, compared with the change itself."""

    error: float = 0.0
    """Sum of squared rounding errors."""
    change: float = 0.0
    """Sum of squared changes by merging."""
    bits: int = 4
    """Of a code."""

    def add(self, before: Tensor, merged: Tensor, packed: Tensor) -> None:
        self.error += _distance(packed, merged)
        self.change += _distance(merged, before)

    @property
    def share(self) -> float | None:
        """Rounding error relative to the change; 1 means equally large."""
        return sqrt(self.error / self.change) if self.change else None


@dataclass
class MergedFile:
    checkpoint: Checkpoint
    name: str
    entries: list[Entry]
    """Tensors of the base, without packed weights of ours."""
    packed: dict[str, list[str]]
    """Packed weights and their items."""
    added: dict[str, tuple[Entry, Change | None]]
    """As in `Plan`, for this file."""
    plan: Plan
    dense: bool
    """Whether packed weights become dense."""
    rounding: Rounding
    metadata: dict[str, str]
    read: ReadPart

    @property
    def size(self) -> int:
        """Maximum size in bytes."""
        return file_size(self.layout, self.metadata)

    @property
    def layout(self) -> Layout:
        found: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {}
        for entry in self.entries:
            kept = entry.items if self._stays_packed(entry) else (entry,)
            found |= {each.name: (each.dtype, each.shape) for each in kept}
        for name, (entry, _) in self.added.items():
            found[name] = (entry.dtype, entry.shape)
        for name, items in self.packed.items():
            if self.dense:
                state, dtype = read_layout(self.checkpoint, name, items)
                found[name] = (dtype, self._shape(name, state))
            else:
                for item in items:
                    entry = self.checkpoint.entries[item]
                    text = ".quant_state." in item and name in self.plan.changes
                    found[item] = None if text else (entry.dtype, entry.shape)
        return found

    def write(self, path: Path, progress: Progress) -> None:
        """Writes the file. Raises CheckpointError for NaN or Inf; other errors as `ShardWriter`."""
        with ShardWriter(path, self.layout, self.metadata) as writer:
            for entry in self.entries:
                change = self.plan.changes.get(entry.name)
                if self._stays_packed(entry):
                    self._write_owned(writer, entry, change)
                elif change is None:
                    writer.copy(entry.name, finite_pieces(entry))
                elif isinstance(change, Experts):
                    for expert in range(entry.shape[0]):
                        row = entry.row(expert)
                        rows = change.of_expert(expert, 0, row.shape[0])
                        writer.write_row(entry.name, self._merged(row.read(), rows, entry.name))
                else:
                    writer.write(entry.name, self._merged(entry.read(), change, entry.name))
                progress(entry.name, sum(item.nbytes for item in getattr(entry, "items", (entry,))))
            for name, (entry, change) in self.added.items():
                dense = entry.read()
                writer.write(name, dense if change is None else self._merged(dense, change, name))
            for name, items in self.packed.items():
                self._write_packed(writer, name, items)
                progress(name, sum(self.checkpoint.entries[item].nbytes for item in items))

    def _merged(self, weight: Tensor, change: Change, name: str) -> Tensor:
        merged = change.of(weight, self.read)
        if not bool(torch.isfinite(merged).all()):
            raise CheckpointError(f"{shown(name)}: expected finite values after merging, got NaN or Inf")
        return merged

    # Packed weights in owners' formats.

    def _stays_packed(self, entry: Entry) -> TypeGuard[PackedEntry]:
        return isinstance(entry, PackedEntry) and not self.dense

    def _write_owned(self, writer: ShardWriter, entry: PackedEntry, change: Change | Experts | None) -> None:
        if change is None:
            for item in entry.items:
                writer.copy(item.name, finite_pieces(item))
            return
        state, aside = entry.state()
        name, dtype, turned = entry.name, entry.dtype, entry.transposed
        if isinstance(change, Experts):
            rows = (change.of_expert(e, 0, entry.shape[1]) for e in range(change.experts))
            parts = (
                self._repacked(name, state.expert(e), dtype, one, turned)._state for e, one in enumerate(rows)
            )
            state = joined(([part] for part in parts), change.experts, entry.name)
        else:
            state = self._repacked(name, state, dtype, change, turned)._state
        with checkpoint_errors():
            written = entry.owner.write(state, aside, entry.name)
        names = [item.name for item in entry.items]
        if written.keys() != {*names}:
            raise CheckpointError(
                f"{entry.name}: expected the tensors {', '.join(sorted(written))}, got {', '.join(names)}"
            )
        for name, tensor in written.items():
            writer.write(name, tensor)

    # Packed weights of ours.

    def _write_packed(self, writer: ShardWriter, name: str, items: list[str]) -> None:
        change = self.plan.changes.get(name)
        if change is None and not self.dense:
            for item in items:
                entry = self.checkpoint.entries[item]
                table = item.endswith(".scale_values")  # where some codes mean NaN
                writer.copy(item, entry.pieces(entry.nbytes) if table else finite_pieces(entry))
            return
        state, dtype = read_nf4(self.checkpoint, name, items)
        if len(state.shape) == 2:
            assert not isinstance(change, Experts)
            self._write_weight(writer, name, items, state, dtype, change)
            return
        blob = next(item for item in items if ".quant_state." in item)
        for expert in range(state.shape[0]):
            rows = change.of_expert(expert, 0, state.shape[1]) if isinstance(change, Experts) else None
            self._write_expert(writer, name, state.expert(expert), dtype, rows)
        if not self.dense:
            writer.write(blob, self.checkpoint.entries[blob].read())

    def _write_weight(
        self,
        writer: ShardWriter,
        name: str,
        items: list[str],
        state: PackedState,
        dtype: torch.dtype,
        change: Change | None,
    ) -> None:
        if self.dense:
            writer.write(name, self._dense(name, state, dtype, change))
            return
        assert change is not None
        written = self._repacked(name, state, dtype, change).state_dict(name=name)
        if written.keys() != set(items):
            raise CheckpointError(
                f"{name}: expected the items {', '.join(sorted(written))}, got {', '.join(sorted(items))}"
            )
        for key, tensor in written.items():
            kind = self.checkpoint.entries[key]
            writer.write(key, tensor.view(kind.shape) if ".quant_state." not in key else tensor)

    def _write_expert(
        self, writer: ShardWriter, name: str, state: PackedState, dtype: torch.dtype, change: Change | None
    ) -> None:
        if self.dense:
            writer.write_row(name, self._dense(name, state, dtype, change))
            return
        assert change is not None
        again = self._repacked(name, state, dtype, change)._state
        for key, tensor in packed_format.tensors(again, name).items():
            writer.write_row(key, tensor)

    def _dense(self, name: str, state: PackedState, dtype: torch.dtype, change: Change | None) -> Tensor:
        weight = state.dequantize(dtype)
        if change is not None:
            weight = self._merged(weight, change, name)
        return weight.t() if name in self.plan.transposed else weight

    def _repacked(
        self, name: str, state: PackedState, dtype: torch.dtype, change: Change, transposed: bool = False
    ) -> PackedWeight:
        """The merged weight, packed as it was. `transposed` is whether the change is for (in, out)."""
        before = state.dequantize(dtype)
        weight = before.mT.contiguous() if transposed else before.clone()
        merged = self._merged(weight, change, name)
        merged = merged.mT.contiguous() if transposed else merged
        with checkpoint_errors():
            packed = PackedWeight.quantize(
                _for_scales(merged, state),
                state.blocksize,
                state.double_quant,
                name=name,
                format=state.format,
            )
        self.rounding.bits = FORMATS[state.format].bits
        self.rounding.add(before, merged, packed._state.dequantize(dtype))
        return packed

    def _shape(self, name: str, state: PackedState) -> tuple[int, ...]:
        *experts, rows, columns = state.shape
        return (*experts, columns, rows) if name in self.plan.transposed else (*experts, rows, columns)


def _for_scales(weight: Tensor, state: PackedState) -> Tensor:
    """The weight in a dtype of which int4's scales get the dtype that they have in `state`."""
    if FORMATS[state.format].scale != "half" or state.absmax is None:
        return weight
    return weight.half() if state.absmax.dtype == torch.float16 else weight.float()


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.float() - b.float(), dtype=torch.float64)) ** 2


def compose(plan: Plan, dense: bool, rounding: Rounding) -> list[MergedFile]:
    """One file per file of the base, of the same name. Items of a packed weight go to the file of its
    codes."""
    checkpoint, items = plan.base, {item for names in plan.packed.values() for item in names}
    # Caches the matrices of two adapters: files alternate between the parts of one expert.
    read = lru_cache(maxsize=4)(partial(read_finite, dtype=torch.float32))
    found = []
    for file in checkpoint.files:
        here = checkpoint.of_file(file)
        entries = [entry for name, entry in here.items() if name not in items]
        weights = {name: names for name, names in plan.packed.items() if name in here}
        added = {name: new for name, new in plan.added.items() if new[0].path == file}
        metadata = {"format": "pt"} | checkpoint.metadata[file.name]
        if entries or weights:
            rest = plan, dense, rounding, metadata, read
            found.append(MergedFile(checkpoint, file.name, entries, weights, added, *rest))
    return found
