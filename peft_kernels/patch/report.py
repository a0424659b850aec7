"""What `patch` did, and what happened since: a report that goes on counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nf4.experts_packing import NF4Experts
from . import eligibility as judge
from . import fused
from .block.attention import FusedAttention
from .block.attention import examine as examine_attention
from .block.decoder_layer import FusedDecoderLayer
from .block.decoder_layer import examine as examine_decoder_layer
from .block.gated_mlp import Facts, FusedMlp
from .block.gated_mlp import examine as examine_mlp
from .block.rms_norm import FusedRmsNorm
from .block.rms_norm import examine as examine_norm
from .experts import eligibility as judge_experts
from .experts.forward import FusedParameters
from .fused import Fused, Record
from .lora.forward import FusedLora
from .lora.linear4bit import FusedLinear4bit
from .loss import eligibility as judge_loss
from .loss.forward import LazyHead, LossFacts, LossModel
from .prefix import eligibility as judge_prefix
from .prefix.forward import FusedPrefix, GeneratingPrefix

PREFIX = "PEFT prefix tuning"
LOSS = "loss without logits"
MLP, NORM, ATTENTION, LAYER = "gated MLP", "norm", "attention", "decoder layer"

NOT_FOUND = {
    "loss": "no model of transformers in here computes the loss of its labels from the logits of a head",
    "block": "no norm, attention module or decoder layer in here is named as Llama names them",
}
"""What the report says of an option that finds nothing."""


@dataclass
class Finding:
    """What a module is to `patch`."""

    kind: str
    mixin: type[Fused] | None
    """What to swap in; None: it is fused as it is, or cannot be."""
    reason: str
    """Why the original forward would run as things are, or ""."""
    facts: Any = None


def examine(module: nn.Module) -> Finding | None:
    """A layer that there is a fused forward for; None: any other module."""
    if isinstance(module, nn.Linear) and judge.is_packed(module):
        return Finding("NF4Linear", None, "" if judge.linear(module) else judge.no_forward(module))
    if isinstance(module, NF4Experts):
        return Finding(f"NF4 {type(module).__name__}", None, judge_experts.packed(module))
    if judge_experts.is_wrapper(module):
        return _examine_wrappers(list(judge_experts.nest(module)))
    if judge.is_lora(module):
        base: Any = module.get_base_layer()  # type: ignore[operator]
        kind = f"PEFT LoRA {type(module).__name__} on {type(base).__name__}"
        reason = judge.lora_class(module, FusedLora)
        return Finding(
            kind, None if reason else FusedLora, reason or judge.lora(module, judge.active(module), FusedLora)
        )
    if judge.is_linear4bit(module):
        known = bool(judge.linear(module))
        reason = (
            judge.unusable(module) if known else "a subclass with a forward of its own, or one not known here"
        )
        return Finding(f"bitsandbytes {type(module).__name__}", FusedLinear4bit if known else None, reason)
    return None


def _examine_wrappers(wrappers: list[Any]) -> Finding:
    base = judge_experts.wrapped(wrappers)
    names = ", ".join(wrapper.parameter_name for wrapper in reversed(wrappers))
    kind = f"PEFT LoRA on {names} of {type(base).__name__}"
    never = judge_experts.never(base)
    reason = never or judge_experts.parameters(wrappers, None, FusedParameters)
    return Finding(kind, None if never else FusedParameters, reason)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Finding]]:
    """What `examine` finds in a model. Wrappers around one module are one layer, the outermost."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inner:
            found = examine(module)
            inner.update(id(wrapper) for wrapper in judge_experts.nest(module))
            if found is not None:
                yield name, module, found


def examine_block(module: nn.Module) -> Finding | None:
    """As `examine`, for modules that hold several layers which one op can serve."""
    found = examine_mlp(module)
    if found is None:
        return None
    kind = f"{MLP} {type(module).__name__}"
    if isinstance(found, Facts):
        return Finding(kind, FusedMlp, "", found)
    return Finding(kind, None, found)


def examine_between(module: nn.Module) -> Finding | None:
    """As `examine`, for what lies between the products of a block: norms, attention modules with their rotary
    embedding, and the layers that hold both."""
    for kind, look, mixin in (
        (NORM, examine_norm, FusedRmsNorm),
        (ATTENTION, examine_attention, FusedAttention),
        (LAYER, examine_decoder_layer, FusedDecoderLayer),
    ):
        reason = look(module)
        if reason is not None:
            return Finding(f"{kind} {type(module).__name__}", None if reason else mixin, reason)
    return None


def is_between(module: nn.Module) -> bool:
    """Whether a module was fused because `examine_between` found it."""
    return fused.has(module, FusedRmsNorm, FusedAttention, FusedDecoderLayer)


def examine_prefix(module: nn.Module) -> Finding | None:
    """As `examine`, for models of PEFT with prefix tuning."""
    if not judge_prefix.is_prefix(module):
        return None
    generates = hasattr(fused.plain_class(module), "prepare_inputs_for_generation")
    active = judge_prefix.is_active(module)
    reason = "" if active else "the active adapter is of another kind"
    mixin = GeneratingPrefix if generates else FusedPrefix
    return Finding(f"{PREFIX} {type(module).__name__}", mixin, reason)


def examine_loss(module: nn.Module) -> Finding | None:
    """As `examine`, for models that compute a loss from labels and logits."""
    if not judge_loss.takes_labels(module):
        return None
    heads = judge_loss.heads(module)
    reasons = [judge_loss.head(layer, FusedLora) for layer in heads]
    if any(fused.record_of(layer) is not None and not fused.has(layer, LazyHead) for layer in heads):
        reasons.append("its head was patched without loss=True; unpatch first")
    kind = f"{LOSS}, {type(module).__name__}"
    never = next((reason for reason in reasons if reason), "")
    return Finding(kind, None if never else LossModel, never, None if never else LossFacts())


@dataclass
class LayerReport:
    """One layer or block, as it is now."""

    name: str
    kind: str
    record: Record | None
    """Of the fused forward that was installed; None: none was."""
    planned: bool = False
    """Only looked at, by `patch(dry_run=True)`: it would be fused by a patch."""
    as_found: str = ""
    """The reason at the time of patching; of use when the model is gone."""
    _module: Any = field(default=lambda: None, repr=False)

    @property
    def fallbacks(self) -> Counter[str]:
        """Calls that went through the original forward after patching, by reason."""
        return Counter() if self.record is None else self.record.fallbacks

    @property
    def reason(self) -> str:
        """Why the original forward runs, as things are now, or ""."""
        module = self._module()
        if module is None or (self.record is not None and fused.record_of(module) is not self.record):
            return self.as_found  # gone, or unpatched: what it was like
        replaced = fused.replaced(module)
        if replaced is not None:
            return replaced
        if self.record is not None and self.record.facts is not None:
            changed: str | None = self.record.facts.changed(module)
            if changed is not None:
                return changed
        found = self._examine(module)
        return "no layer of this kind any more" if found is None else found.reason

    @property
    def _examine(self) -> Callable[[nn.Module], Finding | None]:
        if self.kind.startswith(PREFIX):
            return examine_prefix
        if self.kind.startswith(LOSS):
            return examine_loss
        if self.kind.startswith((NORM, ATTENTION, LAYER)):
            return examine_between
        return examine_block if self.kind.startswith(MLP) else examine

    @property
    def note(self) -> str:
        """What is to be said of one that is fused."""
        module = self._module()
        if self.kind.startswith(LOSS) and self.record is not None:
            reads = [f"{count}x by {by}" for by, count in self.record.facts.reads.items()]
            return "logits are computed where they are read" + (f": {', '.join(reads)}" if reads else "")
        if module is None or not self.kind.startswith(PREFIX):
            return ""
        reason = judge_prefix.not_recomputable(module)
        checkpointing = f"no gradient checkpointing, {reason}" if reason else "gradient checkpointing works"
        return f"one prefix for the batch; {checkpointing}"

    @property
    def fused(self) -> bool:
        """Whether calls run fused, as things are now."""
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
    """One entry per layer that `patch` looked at. `print(report)` shows a summary, and what is not fused and
    why.

    It speaks of the model as it is when it is read: a layer counts as fused when its calls run fused now.
    """

    layers: list[LayerReport]
    """LoRA layers of PEFT, and packed layers without an adapter."""
    blocks: list[LayerReport] = field(default_factory=list)
    """What is fused across layers: gated MLPs, and, where it was asked for, attention modules and norms."""
    bases: list[LayerReport] = field(default_factory=list)
    """Packed layers under LoRA layers, whose calls count where adapters are disabled or merged."""
    prefixes: list[LayerReport] = field(default_factory=list)
    """Models of PEFT with prefix tuning."""
    losses: list[LayerReport] = field(default_factory=list)
    """Models whose loss is computed without their logits."""
    asked: tuple[str, ...] = ()
    """Options of `patch` that look for more than layers."""
    dry_run: bool = False
    _model: Any = field(default=_gone, repr=False)

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
        lines = [f"peft_kernels: {len(self.fused)} of {len(self.layers)} layers {verb}"]
        if not (self.layers or self.blocks or self.prefixes or self.losses):
            lines.append(
                "nothing to patch: no PEFT LoRA layer, bitsandbytes Linear4bit or NF4Linear in this model"
            )
        lines += [f"{option}=True: {NOT_FOUND[option]}" for option in self.asked if not self._found(option)]
        lines += [f"{e.kind}: {e.note}" for e in (*self.prefixes, *self.losses) if e.fused]
        for kind, count in Counter(block.kind for block in self.blocks if block.fused).items():
            lines.append(f"across layers: {count} x {kind}")
        entries = [*self.layers, *self.blocks, *self.prefixes, *self.losses]
        lines += _by_reason("original forward", ((e.reason, 1, e) for e in entries if e.reason), "")
        calls = ((why, n, e) for e in (*entries, *self.bases) for why, n in e.fallbacks.items())
        lines += _by_reason("original forward", calls, "call")
        return "\n".join(lines + self._newcomers())

    def _found(self, option: str) -> bool:
        """Whether the model has anything that an option looks for, fused or not."""
        if option == "loss":
            return bool(self.losses)
        return any(block.kind.startswith((NORM, ATTENTION, LAYER)) for block in self.blocks)

    def _newcomers(self) -> list[str]:
        """A line for every layer that got its adapter after `patch`, and so has no fused forward."""
        model = self._model()
        if model is None or self.dry_run:
            return []
        known = {(entry.name, entry.kind) for entry in (*self.layers, *self.bases)}
        return [
            f"original {name} ({found.kind}): has come after patch(); patch again to fuse it"
            for name, module, found in layers(model)
            if found.mixin is not None and (name, found.kind) not in known and fused.record_of(module) is None
        ]

    def details(self) -> str:
        """A line for every layer and block."""
        return "\n".join(str(layer) for layer in (*self.layers, *self.blocks, *self.prefixes, *self.losses))


def _by_reason(what: str, entries: Iterator[tuple[str, int, LayerReport]], counted: str) -> list[str]:
    """A line for each reason: how often, in how many layers, and which is the first."""
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
