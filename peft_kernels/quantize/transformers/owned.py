"""Saves a model in the format of the owner of the checkpoint from which it was loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ...nf4.experts_forward import weight_names
from ...nf4.experts_packing import packed_weights
from ...nf4.owners import Owner
from ...nf4.owners.stacked import Stacked


def state_dict(model: nn.Module, owner: Owner) -> dict[str, Tensor]:
    """The model's state dict with the owner's tensors for packed weights. These are copies, since the owner's
    order of codes is another.

    Raises ValueError for a weight that the owner's format cannot hold.
    """
    items: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        for key in packed_weights(module):
            weight: Any = module._parameters[key]
            full, stack = f"{name}.{key}", _stack(module, key)
            fits = owner.experts == (weight.dim() == 3) or stack is not None
            if weight._state.format != owner.format or not fits:
                raise ValueError(
                    f"{full}: expected a weight that was loaded in {owner.title}, got one in "
                    f"{weight._state.format.upper()}"
                )
            for item in [item for item in items if item == full or item.startswith(f"{full}.")]:
                del items[item]
            if stack is None:
                items |= owner.write(weight._state, getattr(module, "aside", None) or {}, full)
            else:
                items |= stack.write(weight._state, owner, full)
    return items


def _stack(module: Any, key: str) -> Stacked | None:
    return (getattr(module, "stacks", None) or {}).get(key)


def now_dense(model: nn.Module, loaded: Iterable[str]) -> list[str]:
    """Names of the modules that were loaded in 4 bits and are dense now. Raises ValueError for experts of
    which only one weight is dense, which no owner's reader takes."""
    found, modules = [], dict(model.named_modules())
    for name in loaded:
        module = modules.get(name)
        packed = [] if module is None else packed_weights(module)
        if module is None or len(packed) == len(_weights(module)):
            continue
        if packed:
            dense = next(key for key in _weights(module) if key not in packed)
            raise ValueError(
                f"{name}.{dense}: expected both weights of experts packed or both dense, got {packed[0]} "
                "packed; merge adapters of both or unmerge this one, or dequantize() the model"
            )
        found.append(name)
    return sorted(found)


def _weights(module: Any) -> tuple[str, ...]:
    return weight_names(module) if hasattr(module, "is_transposed") else ("weight",)
