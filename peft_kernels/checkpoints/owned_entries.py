"""A checkpoint in the format of another library, seen as the dense one that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core.code_tables import WEIGHT_DTYPES
from ..core.packed_state import PackedState
from ..nf4.owners import Owner
from .folder import Checkpoint
from .header import CheckpointError, Entry
from .names import Names
from .owned import checkpoint_errors, owned_weights, owner_in, read_owned


@dataclass(frozen=True)
class PackedEntry(Entry):
    """A packed weight, whose name, dtype, shape and bytes are those of the dense one; `path` is the file with
    its codes."""

    owner: Owner
    items: tuple[Entry, ...]
    """Its tensors in the files."""
    transposed: bool
    """Whether the dense weight is (in, out), or (experts, in, out)."""

    def read(self) -> Tensor:
        """The dense weight. Raises CheckpointError for tensors that do not fit, as loading does."""
        dense = self.state()[0].dequantize(self.dtype)
        return self.turned(dense).contiguous().view(self.shape)

    def state(self) -> tuple[PackedState, dict[str, Tensor]]:
        """The packed weight, and what else `Owner.write` needs."""
        tensors = {self.owner.part_of(self.name, item.name): item.read() for item in self.items}
        with checkpoint_errors():
            return self.owner.read(tensors, self.name)

    def turned(self, weight: Tensor) -> Tensor:
        """A weight (out, in) as the dense one, and back."""
        return weight.mT if self.transposed else weight

    def pieces(self, nbytes: int) -> Iterator[bytes]:
        rows = [self.row(e) for e in range(self.shape[0])] if len(self.shape) == 3 else [self]
        for row in rows:
            data: Any = row.read().view(-1).view(torch.uint8).numpy()
            for begin in range(0, len(data), nbytes):
                yield data[begin : begin + nbytes].tobytes()

    def row(self, index: int) -> PackedEntry:
        """One of the experts."""
        assert len(self.shape) == 3
        items = [item.row(index) for item in self.items]
        alone = tuple(replace(item, shape=(1, *item.shape)) for item in items)
        return replace(self, shape=self.shape[1:], nbytes=self.nbytes // self.shape[0], items=alone)


def as_dense(checkpoint: Checkpoint, model: Any = None) -> Checkpoint:
    """The dense checkpoint, in the dtype that config.json names; the same one if it is in no owner's format.

    Parameters
    ----------
    model : PreTrainedModel, optional
        On the meta device. It tells which weights are transposed.

    Raises
    ------
    CheckpointError
        There are no packed weights; or tensors of one are missing, or have other shapes or dtypes.
    """
    owner = owner_in(checkpoint.config)
    if owner is None:
        return checkpoint
    weights, dtype = owned_weights(checkpoint), _dtype(checkpoint.config)
    if not weights:
        raise CheckpointError(
            f"config.json: expected weights in {owner.title}, as its quantization_config says, got none"
        )
    entries, names = dict(checkpoint.entries), None if model is None else Names(model)
    for weight, tensors in weights.items():
        shape = tuple(read_owned(checkpoint, weight, tensors, headers=True).shape)
        items = tuple(entries.pop(name) for name in tensors)
        transposed = owner.experts if names is None else _is_transposed(model, names.in_model(weight)[0])
        codes = next(item for item in items if owner.part_of(weight, item.name) == owner.codes)
        entries[weight] = PackedEntry(
            weight,
            dtype,
            (*shape[:-2], shape[-1], shape[-2]) if transposed else shape,
            codes.begin,
            prod(shape) * dtype.itemsize,
            codes.path,
            owner,
            items,
            transposed,
        )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return replace(checkpoint, entries=entries, config=config)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """That of the dense model; bf16 if config.json does not tell."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            found = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if found in WEIGHT_DTYPES:
                return found
    return torch.bfloat16


def _is_transposed(model: Any, name: str) -> bool:
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))
