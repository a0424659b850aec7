"""Registered adapters: which are in memory, and which are evicted within a budget."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters.files import CONFIG as BOTTLENECK_CONFIG
from ..adapters.files import LARGEST_HEADER
from ..adapters.files import WEIGHTS as BOTTLENECK_WEIGHTS
from ..checkpoints.header import CheckpointError, read_header
from .decoder import Decoder
from .layers import LoraLayers, Rows
from .lora import read_lora

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PROBE = (0, 1, 2, 3)
"""The tokens that a loaded adapter is tried with."""


class BudgetInUse(Exception):
    """The budget is used up by adapters in use."""


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in memory."""

    nbytes: int
    lora: LoraLayers | None = None
    bottleneck: str | None = None
    """Its name in the model."""


class AdapterState(NamedTuple):
    """State of a registered adapter."""

    name: str
    folder: Path
    nbytes: int
    """Bytes in memory; 0 if not loaded."""
    requests: int
    """Number of unfinished requests."""


class Store:
    """Not thread-safe, except for `read`."""

    def __init__(self, decoder: Decoder, budget: int | None, adapter_dtype: torch.dtype) -> None:
        self.decoder = decoder
        self.budget = budget
        self.adapter_dtype = adapter_dtype
        self.folders: dict[str, Path] = {}
        self.resident: OrderedDict[str, Resident] = OrderedDict()
        """In order of use, most recent last."""
        self._sizes: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.resident.values())

    def check(self, name: str, folder: Path) -> None:
        """Raises ValueError for an invalid name, or one of another folder."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"name: expected letters, digits, _ and -, no attribute of ModuleDict, got {name!r}"
            )
        if self.folders.get(name, folder) != folder:
            raise ValueError(f"name: {name!r} is the adapter in {self.folders[name]}: unload it first")

    def register(self, name: str, folder: Path) -> None:
        self.check(name, folder)
        self.folders[name] = folder

    def forget(self, name: str) -> None:
        self._drop(name)
        self._sizes.pop(name, None)
        self.folders.pop(name, None)

    def read(self, name: str, folder: Path) -> Any:
        """Reads a LoRA adapter without changing the model; None for a bottleneck adapter.

        Raises ValueError if it exceeds the budget, before its weights are read."""
        if os.path.lexists(folder / BOTTLENECK_CONFIG):
            if os.path.isfile(weights := folder / BOTTLENECK_WEIGHTS):
                entries = read_header(weights, LARGEST_HEADER)[0].values()
                self._check_fits(name, sum(entry.nbytes for entry in entries))
            return None
        decoder = self.decoder
        return read_lora(
            decoder.model,
            folder,
            decoder.device,
            decoder.dtype,
            self.adapter_dtype,
            lambda nbytes: self._check_fits(name, nbytes),
        )

    def get(self, name: str, in_use: Collection[str], read: Any = None) -> Resident:
        """The adapter, loaded if necessary.

        Raises
        ------
        BudgetInUse
            It does not fit next to the adapters in use.
        ValueError
            It exceeds the budget, its folder is damaged, or its outputs are not finite. Nothing is changed.
        """
        found = self.resident.get(name)
        if found is None:
            size = self._sizes.get(name)
            if size is not None:
                self._to_evict(name, size, in_use)
            found = self._load(name, in_use, read)
        self.resident.move_to_end(name)
        return found

    def _load(self, name: str, in_use: Collection[str], read: Any) -> Resident:
        layers = self.read(name, self.folders[name]) if read is None else read
        model = self.decoder.model
        if layers is None:
            adapters.load(model, self.folders[name], load_as=name)
            parameters = (p for one in _bottlenecks(model, name).values() for p in one.parameters())
            found = Resident(sum(p.nbytes for p in parameters), bottleneck=name)
        else:
            found = Resident(sum(layer.nbytes for layer in layers.values()), lora=layers)
        self._sizes[name] = found.nbytes
        try:
            self._check_finite(name, found)
            for other in self._to_evict(name, found.nbytes, in_use):
                self._drop(other)
        except BaseException:
            if layers is None:
                adapters.delete(model, name)
            raise
        if layers is not None:
            self.decoder.switch.attach(list(layers))
        self.resident[name] = found
        return found

    def _check_finite(self, name: str, adapter: Resident) -> None:
        """Computes a few tokens: weights that are finite in the file may overflow in the model's dtype.
        Raises CheckpointError for NaN or Inf."""
        model = self.decoder.model
        with bottleneck_rows(model, [adapter]):
            logits, _ = self.decoder.start(_PROBE, Rows([adapter.lora]))
        if bool(logits.max().isfinite()):
            return
        sizes = {
            path: {name: _largest(factor) for name, factor in factors.items()}
            for path, factors in _factors(model, adapter).items()
        }
        worst = max(sizes, key=lambda path: prod(max(1.0, size) for size in sizes[path].values()))
        told = ", ".join(f"{name} up to {size:.2g}" for name, size in sizes[worst].items())
        raise CheckpointError(
            f"adapter {name!r}: expected finite logits in {self.decoder.dtype}, got NaN or Inf: its largest "
            f"weights are in {worst}: {told}"
        )

    def _check_fits(self, name: str, nbytes: int) -> None:
        if self.budget is not None and nbytes > self.budget:
            raise ValueError(
                f"adapter {name!r}: expected at most budget_bytes={self.budget} bytes, got {nbytes}"
            )

    def _to_evict(self, name: str, nbytes: int, in_use: Collection[str]) -> list[str]:
        """Names of adapters to evict."""
        self._check_fits(name, nbytes)
        if self.budget is None:
            return []
        left, going = self.budget - self.nbytes, []
        for other, one in self.resident.items():
            if left >= nbytes:
                break
            if other not in in_use:
                going.append(other)
                left += one.nbytes
        if left < nbytes:
            raise BudgetInUse
        return going

    def _drop(self, name: str) -> None:
        found = self.resident.pop(name, None)
        if found is not None and found.bottleneck is not None:
            adapters.delete(self.decoder.model, found.bottleneck)

    def close(self) -> None:
        for name in list(self.resident):
            self._drop(name)
        self.decoder.release()


def bottleneck_rows(model: nn.Module, there: Sequence[Resident | None]) -> Any:
    """A context in which rows use their bottleneck adapters."""
    names = [None if one is None else one.bottleneck for one in there]
    return adapters.rows(model, names) if any(names) else nullcontext()


def _factors(model: nn.Module, adapter: Resident) -> dict[str, dict[str, Tensor]]:
    """What an adapter multiplies its inputs by, by layer and name."""
    if adapter.lora is not None:
        paths = {module: path for path, module in model.named_modules()}
        return {paths[layer]: lora.factors() for layer, lora in adapter.lora.items()}
    found = {} if adapter.bottleneck is None else _bottlenecks(model, adapter.bottleneck)
    return {path: dict(one.named_parameters()) for path, one in found.items()}


def _largest(weight: Tensor) -> float:
    """The largest magnitude; infinite if there is a NaN."""
    return float(weight.abs().nan_to_num(torch.inf).max())


def _bottlenecks(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """A bottleneck adapter's parameters by layer."""
    found = ((site.place.last, site.get(name)) for site in adapters.manage.sites(model))
    return {path: adapter for path, adapter in found if adapter is not None}
