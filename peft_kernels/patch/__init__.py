"""patch(model) installs fused forwards in a model of transformers, PEFT and bitsandbytes; unpatch(model)
removes them.

Only the forward of a patched module changes: saving, merging, switching and disabling adapters stay PEFT's.
Calls that a fused forward does not cover use the original one, and are counted with the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..core import dispatch
from ..core.wrong_types import an
from ..quantize.report import nbytes_of, report_of
from . import fused
from .block.attention_function import FusedAttentionFunction
from .examine import LAYER, LOSS, PARTS, PREFIX, examine_all
from .fused import Record
from .loss.forward import LossModel, head_mixin
from .loss.trl_head import has_trl_head
from .prefix.forward import checkpointed
from .report import LayerReport, PatchReport
from .rules.examination import Examination
from .rules.loss import heads

__all__ = ["LayerReport", "PatchReport", "explain", "patch", "patched", "unpatch"]


def patch(model: nn.Module, without: str | Iterable[str] = (), dry_run: bool = False) -> PatchReport:
    """Install every fused forward that is right and faster for this model on its device.

    Patching twice is harmless; `unpatch` first to change the parts. `unpatch` restores the model exactly.
    Copies of the model (deepcopy) are patched too; a pickle holds the unpatched model. The parts for the CPU
    alone, and the loss, have no effect under torch.compile.

    Parameters
    ----------
    model : nn.Module
    without : str or iterable of str
        Parts to leave out:

        - "layers": PEFT LoRA layers over nn.Linear, NF4Linear, bitsandbytes Linear4bit or the experts of an
          MoE, and Linear4bit alone. NF4Linear and NF4 experts need none.
        - "mlp": a gated MLP (SwiGLU, GeGLU) with LoRA in one op, which saves x, gate and up for backward.
        - "prefix": PEFT's prefix tuning computes its prefix once for the batch, and works under gradient
          checkpointing and in generate.
        - "qkv" (CPU): LoRA projections of queries, keys and values in one op, rotary embeddings in another.
        - "attention" (CPU): the attention function where the configuration says "sdpa". The configuration
          does not change.
        - "norms" (CPU): RMS norms. They have no second derivatives.
        - "residuals" (CPU): the residual sum of a decoder layer like Llama's in one op with the norm after
          it.
        - "loss" (CPU): the head of a model of transformers returns logits that are computed when they are
          read: do that before the optimizer's step. F.cross_entropy, the model's or your own, computes the
          loss from them by `linear_cross_entropy`, without reading them.
    dry_run : bool
        Change nothing; the report says what would be fused.

    Returns
    -------
    PatchReport
        What is fused, and what is not and why. It also counts later calls that use the original forward.

    Raises
    ------
    TypeError
        `model` is not an nn.Module.
    ValueError
        `without` names an unknown part.
    """
    _check_model(model, "patch")
    return _patch(model, _parts(without), dry_run)


def _parts(without: Any) -> frozenset[str]:
    given = (without,) if isinstance(without, str) else without
    if not isinstance(given, Iterable):
        raise TypeError(f"without: expected names of parts, got {an(without)}")
    parts = frozenset(given)
    if unknown := parts - PARTS.keys():
        got = ", ".join(sorted(map(repr, unknown)))
        raise ValueError(f"without: expected some of {', '.join(PARTS)}, got {got}")
    return parts


def _patch(model: nn.Module, without: frozenset[str], dry_run: bool) -> PatchReport:
    report = PatchReport([], without=without, dry_run=dry_run, _model=weakref.ref(model))
    sections = {LAYER: report.layers, LOSS: report.losses, PREFIX: report.prefixes}
    plan: list[tuple[nn.Module, LayerReport, Examination]] = []
    inside: set[nn.Module] = set()  # bases of LoRA layers
    for name, module, family, found in examine_all(model, without):
        record = fused.record_of(module)
        planned = record is None and found.mixin is not None
        entry = LayerReport(
            name, found.kind, record, dry_run and planned, found.reason, weakref.ref(module), family, without
        )
        if planned and _can_install(found, module):
            plan.append((module, entry, found))
        entries = report.bases if module in inside else sections.get(family, report.blocks)
        entries.append(entry)
        base: Any = getattr(module, "get_base_layer", None) if family == LAYER else None
        if base is not None:
            inside.add(base())
    if not dry_run:
        _install(report, plan)
    return report


def _can_install(found: Examination, module: nn.Module) -> bool:
    return found.mixin is LossModel or not fused.replaced_reason(module)  # of that only the head is called


def _install(report: PatchReport, plan: list[tuple[nn.Module, LayerReport, Examination]]) -> None:
    """Swaps the classes of all modules in the plan, or of none if one of them fails."""
    of_heads: dict[nn.Module, Any] = {
        head: head_mixin(head)
        for entry in report.losses
        if not entry.as_found
        for head in heads(entry._module())
    }
    records = [Record(facts=found.facts, without=report.without) for _, _, found in plan]
    planned = [
        (module, of_heads.pop(module, found.mixin), record)
        for (module, _, found), record in zip(plan, records, strict=True)
    ]
    # Not part of the plan; looked for again in a model that is patched already, as layers may be added.
    extra = dict(pair for prefix in report.prefixes for pair in checkpointed(prefix._module())) | of_heads
    if any(issubclass(mixin, FusedAttentionFunction) for _, mixin, _ in planned):
        from .block import attend

        attend.serve_patched()
    fused.fuse_all(
        planned
        + [(module, mixin, Record()) for module, mixin in extra.items() if fused.record_of(module) is None]
    )
    for (module, entry, _), record in zip(plan, records, strict=True):
        entry.record = record
        if entry.family == LOSS and has_trl_head(module):
            module.forward = module.forward  # now ours is set around it
    for entry in report.losses:
        for head in heads(entry._module()) if entry.record is not None else ():
            if (of_head := fused.record_of(head)) is not None:
                of_head.of_model = entry.record


def unpatch(model: nn.Module) -> int:
    """Remove the fused forwards. Returns the number of modules restored."""
    _check_model(model, "unpatch")
    return sum(fused.restore(module) for module in model.modules())


@contextmanager
def patched(model: nn.Module, without: str | Iterable[str] = ()) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches inside the block; layers patched before stay patched."""
    _check_model(model, "patched")
    before = {id(module) for module in model.modules() if fused.record_of(module) is not None}
    report = patch(model, without)
    try:
        yield report
    finally:
        for module in model.modules():
            if id(module) not in before:
                fused.restore(module)


def explain(model: nn.Module | None = None) -> str:
    """Describes the back ends, whether they are usable here, and why not. With a model: what runs fused in
    its present state, and what does not and why. Changes nothing."""
    if model is None:
        return dispatch.explain()
    _check_model(model, "explain")
    records = [record for module in model.modules() if (record := fused.record_of(module)) is not None]
    report = _patch(model, records[0].without if records else frozenset(), dry_run=True)
    report.dry_run = not records and any(entry.planned for entry in report.entries)
    quantised = report_of(model)
    # Its bytes are those when it was quantised; a cast or an adapter changed them.
    lines = [] if quantised is None else [str(replace(quantised, bytes_after=nbytes_of(model)))]
    lines.append(str(report))
    if report.dry_run:
        lines.append("the model is not patched: pk.patch(model) does it")
    return "\n".join(lines)


def _check_model(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else an(model)
        raise TypeError(f"model: {function} expected an nn.Module, got {got}")
