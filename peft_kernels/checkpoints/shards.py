"""The files of a quantised model, written tensor by tensor."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nf4 import packed_format
from ..nf4.bitsandbytes_format import STATE_ITEMS, description
from ..nf4.weight import PackedWeight
from .checks import finite_pieces
from .experts_tensors import ExpertsWeight
from .folder import Checkpoint
from .header import CheckpointError, Entry
from .layers import Choice
from .writer import Layout, ShardWriter, file_size

Progress = Callable[[str, int], None]
"""Called with the name and bytes of each tensor of the source."""


@dataclass
class Shard:
    """One file of the quantised model."""

    name: str
    entries: list[Entry]
    """Tensors of the source, without parts of packed experts."""
    experts: list[ExpertsWeight]
    quantise: dict[str, bool]
    """As in `Choice`, for all files."""
    blocksize: int
    double_quant: bool
    format: str
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes read from the source."""
        return sum(entry.nbytes for entry in self.entries) + sum(weight.nbytes for weight in self.experts)

    @property
    def size(self) -> int:
        """Maximum size in bytes."""
        return file_size(self.layout, self.metadata)

    @property
    def layout(self) -> Layout:
        """The tensors of the file, computed from shapes only."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {}
        for entry in self.entries:
            if entry.name in self.quantise:
                found |= self._layout_of(entry)
            else:
                found[entry.name] = (entry.dtype, entry.shape)
        for weight in self.experts:
            experts, *one = weight.shape
            meta = torch.empty(one, dtype=weight.dtype, device="meta")
            packed = self._nf4(meta, weight.name)
            for name, row in packed_format.tensors(packed._state, weight.name).items():
                found[weight.written(name)] = (row.dtype, (experts, *row.shape))
            item = packed_format.state_item(weight.shape, self.format)
            found[weight.written(f"{weight.name}.{item}")] = None
        return found

    def write(self, path: Path, progress: Progress) -> None:
        """Writes the file. Raises CheckpointError for NaN or Inf; other errors as `ShardWriter`."""
        with ShardWriter(path, self.layout, self.metadata) as writer:
            for entry in self.entries:
                if entry.name in self.quantise:
                    self._quantise(writer, entry)
                else:
                    writer.copy(entry.name, finite_pieces(entry))
                progress(entry.name, entry.nbytes)
            for weight in self.experts:
                self._pack(writer, weight, progress)

    def _layout_of(self, entry: Entry) -> dict[str, tuple[torch.dtype, tuple[int, ...]] | None]:
        meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        weight = self._nf4(meta.t() if self.quantise[entry.name] else meta, entry.name)
        items = weight.state_dict(name=entry.name)
        return {
            key: None
            if key.endswith((*STATE_ITEMS, *packed_format.STATE_ITEMS))
            else (item.dtype, tuple(item.shape))
            for key, item in items.items()
        }

    def _quantise(self, writer: ShardWriter, entry: Entry) -> None:
        dense = entry.read()
        weight = self._nf4(dense.t() if self.quantise[entry.name] else dense, entry.name)
        del dense
        for key, tensor in weight.state_dict(name=entry.name).items():
            writer.write(key, tensor)

    def _pack(self, writer: ShardWriter, weight: ExpertsWeight, progress: Progress) -> None:
        number = itertools.count()  # `enumerate` would keep an expert alive while the next is read
        for dense in weight.experts(lambda entry: progress(entry.name, entry.nbytes)):
            one = self._nf4(dense, f"{weight.name}[{next(number)}]")
            del dense
            for key, tensor in packed_format.tensors(one._state, weight.name).items():
                writer.write_row(weight.written(key), tensor)
        blob = description(weight.shape, self.blocksize, weight.dtype, self.format)
        item = packed_format.state_item(weight.shape, self.format)
        key = weight.written(f"{weight.name}.{item}")
        writer.write(key, torch.tensor(list(blob), dtype=torch.uint8))

    def _nf4(self, dense: torch.Tensor, name: str) -> PackedWeight:
        try:
            return PackedWeight.quantize(
                dense, self.blocksize, self.double_quant, name=name, format=self.format
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def compose(
    checkpoint: Checkpoint, choice: Choice, blocksize: int, double_quant: bool, format: str = "nf4"
) -> list[Shard]:
    """One shard per file of the source, of the same name. Packed experts go to the file of their first part.
    If a file becomes empty, the others are renumbered."""
    parts = {entry.name for weight in choice.experts.values() for entry in weight.entries}
    found = []
    for file in checkpoint.files:
        entries = [entry for name, entry in checkpoint.of_file(file).items() if name not in parts]
        experts = [weight for weight in choice.experts.values() if weight.entries[0].path == file]
        # transformers refuses a file that does not name its format.
        metadata = {"format": "pt"} | checkpoint.metadata[file.name]
        if entries or experts:
            rest = choice.quantise, blocksize, double_quant, format, metadata
            found.append(Shard(file.name, entries, experts, *rest))
    if len(found) < len(checkpoint.files):
        for i, shard in enumerate(found, 1):
            shard.name = re.sub(r"-\d{5}-of-\d{5}(?=\.)", f"-{i:05}-of-{len(found):05}", shard.name)
    return found
