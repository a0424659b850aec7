"""patch(model): fused forwards for the layers of PEFT and bitsandbytes, by instance, and out again.

A patched module keeps its class, parameters, hooks and state dict; only `module.forward` is set on the
instance. So saving, merging, adapter switching and disabling stay PEFT's. What a fused path does not cover
goes through the class's own forward, and is counted with its reason.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .integrations import layers
from .integrations.forward import replaced


@dataclass
class LayerReport:
    """What `patch` did with one layer."""

    name: str
    kind: str
    fused: bool
    reason: str = ""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Calls that went through the original forward after patching, by reason. Counts on while the model
    runs."""

    def __str__(self) -> str:
        status = "fused" if self.fused else "original"
        notes = [self.reason] if self.reason else []
        notes += [f"original forward {n}x: {reason}" for reason, n in self.fallbacks.items()]
        return f"{status:<8} {self.name} ({self.kind})" + (f": {'; '.join(notes)}" if notes else "")


@dataclass
class PatchReport:
    """One entry per layer that `patch` looked at. `print(report)` shows a summary and what is not fused."""

    layers: list[LayerReport]

    @property
    def fused(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.fused]

    @property
    def original(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.fused]

    def __str__(self) -> str:
        aside = sum(bool(layer.reason) for layer in self.fused)
        headline = f"peft_kernels: {len(self.fused) - aside} of {len(self.layers)} layers fused"
        lines = [headline + (f", {aside} more step aside as said below" if aside else "")]
        if not self.layers:
            lines.append(
                "nothing to patch: no PEFT LoRA layer, bitsandbytes Linear4bit or NF4Linear in this model"
            )
        shown = [layer for layer in self.layers if not layer.fused or layer.reason or layer.fallbacks]
        return "\n".join(lines + [str(layer) for layer in shown])

    def details(self) -> str:
        """A line for every layer."""
        return "\n".join(str(layer) for layer in self.layers)


def patch(model: nn.Module) -> PatchReport:
    """Give the layers of a model fused forwards: PEFT LoRA over nn.Linear, NF4Linear or bitsandbytes
    Linear4bit, and Linear4bit alone. NF4Linear is fused as it is.

    Patching twice is harmless. `unpatch` restores the model to the bit.

    Returns
    -------
    PatchReport
        A line per layer: fused, or why not. It goes on counting calls that had to take the original forward.
    """
    plan: list[tuple[nn.Module, LayerReport, Callable[..., Any]]] = []
    report = PatchReport([])
    for name, module in model.named_modules():
        kind, forward, reason = layers.examine(module)
        if kind is None:
            continue
        ours = installed(module)
        if ours is not None:
            layer = LayerReport(name, kind, True, reason, ours.keywords["fallbacks"])
        elif forward is None:
            layer = LayerReport(name, kind, not reason, reason)
        elif replaced(module) is not None:
            layer = LayerReport(name, kind, False, "its forward is already replaced (an accelerate hook?)")
        else:
            layer = LayerReport(name, kind, True, reason)
            plan.append((module, layer, forward))
        report.layers.append(layer)
    # Nothing above has touched the model, and nothing below can fail.
    for module, layer, forward in plan:
        module.forward = functools.partial(forward, module, fallbacks=layer.fallbacks)
    return report


def unpatch(model: nn.Module) -> int:
    """Take the fused forwards out again. Returns the number of layers restored."""
    return sum(_restore(module) for module in model.modules())


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches inside the block; layers that were patched before stay so."""
    before = {id(module) for module in model.modules() if installed(module) is not None}
    report = patch(model)
    try:
        yield report
    finally:
        for module in model.modules():
            if id(module) not in before:
                _restore(module)


def installed(module: nn.Module) -> functools.partial[Any] | None:
    """The fused forward that is installed on a module, itself or under an accelerate hook, or None."""
    place = _place(module)
    return None if place is None else module.__dict__[place]


def _place(module: nn.Module) -> str | None:
    for attribute in ("forward", "_old_forward"):  # accelerate keeps the forward it wraps in the second
        forward = module.__dict__.get(attribute)
        if isinstance(forward, functools.partial) and forward.func in layers.FORWARDS:
            return attribute
    return None


def _restore(module: nn.Module) -> bool:
    place = _place(module)
    if place == "forward":
        del module.__dict__["forward"]
    elif place is not None:
        module.__dict__[place] = type(module).forward.__get__(module)
    return place is not None
