"""Query, key and value projection in one op: found by structure, and done without touching the attention.

The attention module calls its three projections one after the other with the same x. The first call computes
all three and leaves two results for the calls to come, which take them if they come with that very x. If they
do not (cross-attention gives key and value another x), the group goes back to one call for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import multi_lora_linear
from . import lora

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SharedInput:
    """Layers that are given the same x, in the order in which they are called."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.reason = ""
        """Why the layers run apart again, or empty."""
        self._forget()

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._circumstances: Any = None
        self._ready: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "reason": self.reason}  # activations in flight are not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def take(self, layer: Any, x: Tensor, has_arguments: bool) -> Tensor | None:
        """The output of `layer` for x, or None when the layer is to compute it alone."""
        if self.reason or torch.compiler.is_compiling():
            return None
        if layer is not self.layers[0]:
            y = self._ready.pop(id(layer), None)
            if y is not None and (self._x is not x or self._circumstances != _circumstances(x)):
                self._separate("a later projection is given another x")
                return None
            if not self._ready:
                self._forget()
            return y
        if self._ready:
            self._separate("a later projection was not called")
            return None
        calls = None if has_arguments else self._prepare(x)
        if calls is None:
            return None
        outputs = multi_lora_linear(x.to(calls[0].dtype), [call.layer for call in calls])
        first, *rest = (y.to(call.out_dtype) for y, call in zip(outputs, calls, strict=True))
        self._x, self._circumstances = x, _circumstances(x)
        self._ready = {id(module): y for module, y in zip(self.layers[1:], rest, strict=True)}
        return first

    def _prepare(self, x: Tensor) -> list[lora.Call] | None:
        calls: list[lora.Call] = []
        for module in self.layers:
            call = "" if is_plain(module) else prepare_summed(module, x)
            if isinstance(call, str) or (calls and call.dtype != calls[0].dtype):
                return None
            calls.append(call)
        return calls

    def _separate(self, reason: str) -> None:
        self.reason = reason
        self._forget()


def prepare_summed(module: Any, x: Tensor) -> lora.Call | str:
    """A projection as `multi_lora_linear` and `gated_mlp` take it: a linear layer, its adapters summed."""
    if lora.has_hooks(module):
        return "hooks on a projection, which a fused forward would pass by"
    if not hasattr(module, "lora_A"):
        return lora.prepare_base(module, x)
    names = lora.active_names(module)
    if any(name in module.lora_variant for name in names):
        return "DoRA or another variant"
    return lora.prepare(module, x, names)


def is_plain(module: Any) -> bool:
    """Whether a LoRA layer is to act as its base layer alone, by PEFT's own forward."""
    return bool(getattr(module, "disable_adapters", False) or getattr(module, "merged", False))


def find(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every group of LoRA projections that may be given the same x, by the name of their parent."""
    for name, parent in model.named_modules():
        layers: list[Any] = [getattr(parent, child, None) for child in PROJECTIONS]
        adapted = all(isinstance(layer, nn.Module) and hasattr(layer, "lora_A") for layer in layers)
        if adapted and len({layer.in_features for layer in layers}) == 1:
            yield name, layers


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """What two calls must have in common for one to answer the other."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return x._version, torch.is_grad_enabled(), autocast and torch.get_autocast_dtype(x.device.type)
