"""patch(model) installs fused forwards in the layers of PEFT and bitsandbytes; unpatch(model) removes them.

Only the forward of a patched module changes: saving, merging, switching and disabling adapters stay PEFT's.
Calls that a fused forward does not cover use the original one, and are counted with the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core import dispatch
from ..quantize.model import report_of
from . import fused
from .examination import Examination
from .examine import LAYER, LOSS, PREFIX, examine_all
from .fused import Fused, Record
from .loss.eligibility import heads
from .loss.forward import head_mixin
from .prefix.forward import checkpointed
from .report import LayerReport, PatchReport

__all__ = ["LayerReport", "PatchReport", "explain", "patch", "patched", "unpatch"]


def patch(
    model: nn.Module, mlp: bool = True, dry_run: bool = False, loss: bool = False, block: bool = False
) -> PatchReport:
    """Install fused forwards in a model: in PEFT LoRA layers over nn.Linear, NF4Linear, bitsandbytes
    Linear4bit or the experts of an MoE, and in Linear4bit alone. NF4Linear and NF4 experts need none. PEFT's
    prefix tuning computes its prefix once for the batch, and works under gradient checkpointing and in
    generate.

    Patching twice is harmless; `unpatch` first to change the options. `unpatch` restores the model exactly.
    Copies of the model (deepcopy) are patched too; a pickle holds the unpatched model.

    Parameters
    ----------
    model : nn.Module
    mlp : bool
        Compute a gated MLP (SwiGLU, GeGLU) with LoRA in one op, which saves x, gate and up for backward.
    dry_run : bool
        Change nothing; the report says what would be fused.
    loss : bool
        Models of transformers compute the loss of their labels by `linear_cross_entropy`. `outputs.logits`
        are then computed when they are read: do that before the optimizer's step.
    block : bool
        On the CPU, fuse RMS norms, rotary embeddings, and the projections of queries, keys and values of
        blocks like Llama's, with adapters or without. The norms have no second derivatives. Has no effect
        under torch.compile.

    Returns
    -------
    PatchReport
        What is fused, and what is not and why. It also counts later calls that use the original forward.

    Raises
    ------
    TypeError
        `model` is not an nn.Module.
    """
    _check_model(model, "patch")
    asked = tuple(name for name, value in (("loss", loss), ("block", block)) if value)
    report = PatchReport([], asked=asked, dry_run=dry_run, _model=weakref.ref(model))
    sections = {LAYER: report.layers, LOSS: report.losses, PREFIX: report.prefixes}
    plan: list[tuple[nn.Module, LayerReport, Examination]] = []
    inside: set[nn.Module] = set()  # bases of LoRA layers
    for name, module, family, found in examine_all(model, mlp, block, loss):
        record = fused.record_of(module)
        planned = record is None and found.mixin is not None
        entry = LayerReport(
            name, found.kind, record, dry_run and planned, found.reason, weakref.ref(module), family
        )
        if planned and not fused.replaced_reason(module):
            plan.append((module, entry, found))
        entries = report.bases if module in inside else sections.get(family, report.blocks)
        entries.append(entry)
        base: Any = getattr(module, "get_base_layer", None) if family == LAYER else None
        if base is not None:
            inside.add(base())
    if not dry_run:
        _install(report, plan)
    return report


def _install(report: PatchReport, plan: list[tuple[nn.Module, LayerReport, Examination]]) -> None:
    """Swaps the classes of all modules in the plan, or of none if one of them fails."""
    mixins: dict[nn.Module, type[Fused]] = {}
    for module, _, found in plan:
        assert found.mixin is not None
        mixins[module] = found.mixin
    # Not part of the plan; looked for again in a model that is patched already, as layers may be added.
    extra: dict[nn.Module, type[Fused]] = {
        module: mixin for prefix in report.prefixes for module, mixin in checkpointed(prefix._module())
    }
    for entry in report.losses:
        for head in heads(entry._module()) if not entry.as_found else ():
            if head in mixins:
                mixins[head] = head_mixin(head)
            else:
                extra[head] = head_mixin(head)
    records = [Record(facts=found.facts) for _, _, found in plan]
    fused.fuse_all(
        [(module, mixins[module], record) for (module, _, _), record in zip(plan, records, strict=True)]
        + [(module, mixin, Record()) for module, mixin in extra.items() if fused.record_of(module) is None]
    )
    for (_, entry, _), record in zip(plan, records, strict=True):
        entry.record = record


def unpatch(model: nn.Module) -> int:
    """Remove the fused forwards. Returns the number of modules restored."""
    _check_model(model, "unpatch")
    return sum(fused.restore(module) for module in model.modules())


@contextmanager
def patched(
    model: nn.Module, mlp: bool = True, loss: bool = False, block: bool = False
) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches inside the block; layers patched before stay patched."""
    _check_model(model, "patched")
    before = {id(module) for module in model.modules() if fused.record_of(module) is not None}
    report = patch(model, mlp, loss=loss, block=block)
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
    installed = any(fused.record_of(module) is not None for module in model.modules())
    report = patch(model, dry_run=True)
    report.dry_run = not installed and any(entry.planned for entry in (*report.layers, *report.prefixes))
    quantised = report_of(model)
    lines = [] if quantised is None else [str(quantised)]
    lines.append(str(report))
    if report.dry_run:
        lines.append("the model is not patched: pk.patch(model) does it")
    return "\n".join(lines)


def _check_model(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model: {function} expected an nn.Module, got {got}")
