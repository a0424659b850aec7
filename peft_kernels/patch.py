"""patch(model): fused forwards for the layers of PEFT and bitsandbytes, by instance, and out again.

A patched module keeps its class, parameters, hooks and state dict; only `module.forward` is set on the
instance. So saving, merging, adapter switching and disabling stay PEFT's. What a fused path does not cover
goes through the class's own forward, and is counted with its reason.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .integrations import ddp, layers
from .integrations.forward import replaced
from .integrations.shared_input import SharedInput


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
    blocks: list[LayerReport] = field(default_factory=list)
    """What is fused across layers: gated MLPs, and projections that share their input."""
    _model: Callable[[], nn.Module | None] = field(default=lambda: None, repr=False)

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
        for kind, count in Counter(block.kind for block in self.blocks if block.fused).items():
            lines.append(f"across layers: {count} x {kind}")
        shown = [
            layer
            for layer in (*self.layers, *self.blocks)
            if not layer.fused or layer.reason or layer.fallbacks
        ]
        return "\n".join(lines + [str(layer) for layer in shown] + self._newcomers())

    def _newcomers(self) -> list[str]:
        """A line for every layer that got its adapter after `patch`, and so has no fused forward."""
        model, known = self._model(), {(layer.name, layer.kind) for layer in self.layers}
        if model is None:
            return []
        return [
            f"original {name} ({kind}): has come after patch(); patch again to fuse it"
            for name, module in model.named_modules()
            for kind, forward, _ in [layers.examine(module)]
            if forward is not None and (name, kind) not in known and installed(module) is None
        ]

    def details(self) -> str:
        """A line for every layer and block."""
        return "\n".join(str(layer) for layer in (*self.layers, *self.blocks))


def patch(model: nn.Module, qkv: bool = True, mlp: bool = True) -> PatchReport:
    """Give the layers of a model fused forwards: PEFT LoRA over nn.Linear, NF4Linear or bitsandbytes
    Linear4bit, and Linear4bit alone. NF4Linear is fused as it is.

    Patching twice is harmless; `unpatch` first to change the options. `unpatch` restores the model to the
    bit.

    Parameters
    ----------
    qkv : bool
        Compute query, key and value projection of an attention block in one op, where all three have LoRA.
    mlp : bool
        Compute a gated MLP (SwiGLU, GeGLU) with LoRA in one op, which keeps x, gate and up for backward.

    Returns
    -------
    PatchReport
        A line per layer: fused, or why not. It goes on counting calls that had to take the original forward.
    """
    plan: list[tuple[nn.Module, LayerReport, Callable[..., Any]]] = []
    report = PatchReport([])
    for name, module in model.named_modules():
        examined = [(report.layers, layers.examine(module))]
        if mlp:
            examined.append((report.blocks, layers.examine_block(module)))
        for entries, (kind, forward, reason) in examined:
            if kind is None:
                continue
            ours = installed(module)
            if ours is not None:
                layer = LayerReport(name, kind, True, reason, ours.keywords["fallbacks"])
            elif forward is None:
                layer = LayerReport(name, kind, not reason, reason)
            elif replaced(module) is not None:
                layer = LayerReport(
                    name, kind, False, "its forward is already replaced (an accelerate hook?)"
                )
            else:
                layer = LayerReport(name, kind, True, reason)
                plan.append((module, layer, forward))
            entries.append(layer)
    # Nothing above has touched the model, and nothing below can fail.
    for module, layer, forward in plan:
        module.forward = functools.partial(forward, module, fallbacks=layer.fallbacks)
    if qkv:
        report.blocks += _share_inputs(model)
    ddp.ignore_packed(model)
    report._model = weakref.ref(model)
    return report


def _share_inputs(model: nn.Module) -> list[LayerReport]:
    entries = []
    for name, projections in layers.sharing(model):
        partials = [module.__dict__.get("forward") for module in projections]
        if all(isinstance(partial, functools.partial) for partial in partials):
            shared = SharedInput(projections)
            for module in projections:
                old = module.__dict__["forward"]
                if "shared" not in old.keywords:
                    module.forward = functools.partial(old, shared=shared)
            entries.append(LayerReport(name, "projections that share their input", True))
    return entries


def unpatch(model: nn.Module) -> int:
    """Take the fused forwards out again. Returns the number of layers restored."""
    ddp.ignore_packed(model, undo=True)
    return sum(_restore(module) for module in model.modules())


@contextmanager
def patched(model: nn.Module, qkv: bool = True, mlp: bool = True) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches inside the block; layers that were patched before stay so."""
    before = {id(module) for module in model.modules() if installed(module) is not None}
    report = patch(model, qkv, mlp)
    try:
        yield report
    finally:
        if not before:
            ddp.ignore_packed(model, undo=True)
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
