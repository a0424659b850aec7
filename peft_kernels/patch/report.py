"""What `patch` did, and which calls have used the original forward since."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..host_memory import returns_freed_memory
from .block.attention_function import AttentionFacts, function_reason
from .examine import LAYER, LOSS, MLP, PREFIX, examine, layers
from .fused import Record, record_of, replaced_reason
from .rules.calls import NO_KERNEL
from .rules.prefix import not_recomputable


@dataclass
class LayerReport:
    """One layer or block, in its present state."""

    name: str
    kind: str
    record: Record | None
    """Of the installed fused forward, or None."""
    planned: bool = False
    """Found by `patch(dry_run=True)`: a patch would fuse it."""
    as_found: str = ""
    """The reason at the time of patching, for when the model no longer exists."""
    _module: Any = field(default=lambda: None, repr=False)
    family: str = field(default=LAYER, repr=False)
    without: frozenset[str] = field(default=frozenset(), repr=False)
    """The parts that `patch` was told to leave out."""

    @property
    def fallbacks(self) -> Counter[str]:
        """Calls that used the original forward after patching, by reason."""
        return Counter() if self.record is None else self.record.fallbacks

    @property
    def reason(self) -> str:
        """Why the original forward runs in the present state, or ""."""
        module = self._module()
        if module is None or (self.record is not None and record_of(module) is not self.record):
            return self.as_found
        if self.family != LOSS and (reason := replaced_reason(module)):
            return reason
        if self.record is not None and self.record.facts is not None:
            changed: str = self.record.facts.change_reason(module)
            if changed:
                return changed
        found = examine(module, self.family, without=self.without)
        return "no layer of this kind any more; patch again" if found is None else found.reason

    @property
    def note(self) -> str:
        """Remarks on a fused layer."""
        module = self._module()
        if self.family == LOSS:
            counts = self.record.facts.reads if self.record is not None else {}
            reads = [f"{count}x by {by}" for by, count in counts.items()]
            return "logits are computed where they are read" + (f": {', '.join(reads)}" if reads else "")
        facts = None if self.record is None else self.record.facts
        if module is not None and isinstance(facts, AttentionFacts):
            if facts.projection_reason:
                return f"projections by its own forward, {facts.projection_reason}"
            return function_reason(module) if facts.attends else ""
        if module is None or self.family != PREFIX:
            return ""
        reason = not_recomputable(module)
        checkpointing = f"no gradient checkpointing, {reason}" if reason else "gradient checkpointing works"
        return f"one prefix for the batch; {checkpointing}"

    @property
    def fused(self) -> bool:
        """Whether calls run fused in the present state."""
        return not self.reason

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"as_found": self.reason, "_module": _gone}

    def __str__(self) -> str:
        reason = self.reason
        status = "original" if reason else "fused"
        notes = [reason] if reason else [note] if (note := self.note) else []
        notes += [f"original forward {n}x: {why}" for why, n in self.fallbacks.items()]
        return f"{status:<8} {self.name} ({self.kind})" + (f": {'; '.join(notes)}" if notes else "")


def _gone() -> None:
    return None


@dataclass
class PatchReport:
    """One entry per layer that `patch` examined. `print(report)` shows a summary, and what is not fused and
    why.

    It describes the present state of the model: a layer counts as fused if its calls run fused now.
    """

    layers: list[LayerReport]
    """LoRA layers of PEFT, and quantised layers without an adapter."""
    blocks: list[LayerReport] = field(default_factory=list)
    """Gated MLPs, attention modules, norms, decoder layers."""
    bases: list[LayerReport] = field(default_factory=list)
    """Quantised layers inside LoRA layers, which are called while adapters are disabled or merged."""
    prefixes: list[LayerReport] = field(default_factory=list)
    """PeftModels with prefix tuning."""
    losses: list[LayerReport] = field(default_factory=list)
    """Models whose loss is computed without logits."""
    without: frozenset[str] = frozenset()
    """The parts that `patch` was told to leave out."""
    dry_run: bool = False
    _model: Any = field(default=_gone, repr=False)

    @property
    def entries(self) -> list[LayerReport]:
        """All but `bases`."""
        return [*self.layers, *self.blocks, *self.prefixes, *self.losses]

    @property
    def fused(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.fused]

    @property
    def original(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.fused]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": _gone}

    def __str__(self) -> str:
        verb = "would be fused" if self.dry_run else "fused"
        layers = f"{len(self.fused)} of {len(self.layers)} layers {verb}" if self.layers else ""
        lines = [f"peft_kernels: {layers or 'no LoRA or 4-bit layers'}{self._lost()}"]
        if not self.entries:
            lines.append(
                "nothing to patch: no PEFT LoRA layer, bitsandbytes Linear4bit or NF4Linear in this model "
                "(bottleneck adapters of this package are fused without a patch)"
            )
        lines += [f"{e.kind}: {e.note}" for e in (*self.prefixes, *self.losses) if e.fused]
        for kind, count in Counter(block.kind for block in self.blocks if block.fused).items():
            lines.append(f"across layers: {count} x {kind}")
        lines += self._compiled()
        noted = ((e.note, 1, e) for e in self.blocks if e.fused and e.note)
        lines += _by_reason("in part", noted, "")
        entries = self.entries
        lines += _by_reason("original forward", ((e.reason, 1, e) for e in entries if e.reason), "")
        calls = ((why, n, e) for e in (*entries, *self.bases) for why, n in e.fallbacks.items())
        lines += _by_reason("original forward", calls, "call")
        return "\n".join(lines + self._added_later() + self._advice())

    def _lost(self) -> str:
        """The kinds of blocks and losses that run the model's own code in whole or in part, although the
        device has a kernel for them."""
        reasons = [(block.family, block.reason or block.note) for block in self.blocks]
        reasons += [(entry.family, entry.reason) for entry in (*self.prefixes, *self.losses)]
        found = Counter(family for family, _ in reasons)
        lost = Counter(family for family, reason in reasons if reason and not reason.endswith(NO_KERNEL))
        parts = [f"{family} ({count} of {found[family]})" for family, count in lost.items()]
        return f"; not fully fused: {', '.join(parts)}" if parts else ""

    def _compiled(self) -> list[str]:
        """The fused parts that have no effect in a model that torch.compile has compiled, by name."""
        model, dynamo = self._model(), sys.modules.get("torch._dynamo.eval_frame")
        wrapper: Any = getattr(dynamo, "OptimizedModule", ())  # of torch.compile(model), not model.compile()
        modules = () if model is None else model.modules()
        if not any(getattr(m, "_compiled_call_impl", None) or isinstance(m, wrapper) for m in modules):
            return []
        parts = dict.fromkeys(e.family for e in (*self.blocks, *self.losses) if e.fused and e.family != MLP)
        if not parts:
            return []
        return [f"in what torch.compile compiled, the model's own code runs for: {', '.join(parts)}"]

    def _advice(self) -> list[str]:
        """What else would speed up a whole model."""
        model = self._model() if self.losses else None
        trained = () if model is None else (p for p in model.parameters() if p.requires_grad)
        if any(p.device.type == "cpu" for p in trained) and returns_freed_memory():
            return ["for training on a CPU: call pk.keep_freed_memory() once at start to reuse memory"]
        return []

    def _added_later(self) -> list[str]:
        """A line for every layer that got its adapter after `patch`, so that it has no fused forward."""
        model = self._model()
        if model is None or self.dry_run or "layers" in self.without:
            return []
        known = {(entry.name, entry.kind) for entry in (*self.layers, *self.bases)}
        return [
            f"original {name} ({found.kind}): was added after patch(); patch again to fuse it"
            for name, module, found in layers(model)
            if found.mixin is not None and (name, found.kind) not in known and record_of(module) is None
        ]

    def details(self) -> str:
        """A line for every layer and block."""
        return "\n".join(str(layer) for layer in self.entries)


def _by_reason(what: str, entries: Iterator[tuple[str, int, LayerReport]], counted: str) -> list[str]:
    """A line for each reason: the count, the number of layers, and the first of them."""
    counts: Counter[str] = Counter()
    layers: dict[str, list[LayerReport]] = {}
    for reason, count, entry in entries:
        counts[reason] += count
        layers.setdefault(reason, []).append(entry)
    lines = []
    for reason, count in counts.items():
        first, *more = layers[reason]
        where = f"{first.name} ({first.kind})" + (f" and {len(more)} more" if more else "")
        number = _number(len(layers[reason]), "layer")
        if counted:
            number = f"{_number(count, counted)} of {number}"
        lines.append(f"{what}, {number}: {reason}: {where}")
    return lines


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
