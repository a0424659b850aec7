"""Packed weights that accelerate keeps on the CPU or on disk and loads for each call of their layer.

`dispatch_model` and `cpu_offload` read a model's state dict, in which a packed weight is several items, and
assign to the parameter the item of its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .packed_format import ITEMS
from .weight import PackedWeight


def take_packed(hook: Any, layer: nn.Module) -> None:
    """Makes an accelerate hook load whole packed weights for a layer."""
    for one in getattr(hook, "hooks", (hook,)):
        found = getattr(one, "weights_map", None)
        if _offloads(one) and found is not None and not isinstance(found, _Offloaded):
            packed = {name for name, p in layer._parameters.items() if isinstance(p, PackedWeight)}
            one.weights_map = _Offloaded(found, packed)


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate offloads the weights of a layer between calls."""
    hook = getattr(layer, "_hf_hook", None)
    return any(_offloads(one) for one in getattr(hook, "hooks", (hook,)))


def _offloads(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False))


class _Offloaded(Mapping[str, Tensor]):
    """Tensors of a layer by name; those in `packed` are assembled from several entries of `items`."""

    def __init__(self, items: Mapping[str, Tensor], packed: set[str]) -> None:
        self._items, self._packed = items, packed

    def __getitem__(self, name: str) -> Tensor:
        value = self._items[name]
        if name not in self._packed or isinstance(value, PackedWeight):
            return value
        keys = [f"{name}.{item}" for item in ITEMS]
        parts = {key: self._items[key] for key in keys if key in self._items}
        return PackedWeight.from_state_dict({name: value, **parts}, name=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
