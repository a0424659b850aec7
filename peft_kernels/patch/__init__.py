"""patch(model): fused forwards for the layers of PEFT and bitsandbytes, and out again.

A patched module stays what it is in everything but its forward, so saving, merging, adapter switching and
disabling stay PEFT's. What a fused forward does not cover goes through the original one, and is counted with
its reason.
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
from .fused import Record
from .loss import eligibility as judge_loss
from .loss.forward import LossModel, head_mixin
from .prefix.forward import checkpointed as prefix_layers
from .report import (
    Finding,
    LayerReport,
    PatchReport,
    examine_between,
    examine_block,
    examine_loss,
    examine_prefix,
    is_between,
    layers,
)

__all__ = ["LayerReport", "PatchReport", "explain", "patch", "patched", "unpatch"]


def patch(
    model: nn.Module, mlp: bool = True, dry_run: bool = False, loss: bool = False, block: bool = False
) -> PatchReport:
    """Give the layers of a model fused forwards: PEFT LoRA over nn.Linear, NF4Linear, bitsandbytes Linear4bit
    or the experts of a mixture, and Linear4bit alone. NF4Linear and NF4 experts are fused as they are. PEFT's
    prefix tuning computes its prefix once for the batch, works under gradient checkpointing, and in generate.

    Patching twice is harmless; `unpatch` first to change the options. `unpatch` restores the model to the
    bit. Copies of the model (deepcopy) are patched too; a pickle holds the model as it would be unpatched.

    Parameters
    ----------
    model : nn.Module
    mlp : bool
        Compute a gated MLP (SwiGLU, GeGLU) with LoRA in one op, which keeps x, gate and up for backward.
    dry_run : bool
        Change nothing; the report says what would be fused.
    loss : bool
        Models of transformers compute the loss of their labels by `linear_cross_entropy`. `outputs.logits`
        are then computed when they are read: do that before the optimizer's step.
    block : bool
        On the CPU, what lies between the products of blocks like Llama's: RMS norms, rotary embeddings, and
        the projections of queries, keys and values in one op. With adapters or without; the norms have no
        second derivatives. Under torch.compile nothing changes.

    Returns
    -------
    PatchReport
        What is fused, and what is not and why. It goes on counting calls that had to take the original
        forward.

    Raises
    ------
    TypeError
        `model` is not an nn.Module.
    """
    _check_model(model, "patch")
    asked = tuple(name for name, value in (("loss", loss), ("block", block)) if value)
    report = PatchReport([], asked=asked, dry_run=dry_run, _model=weakref.ref(model))
    plan: list[tuple[nn.Module, LayerReport, Finding]] = []
    inside: set[nn.Module] = set()  # bases of LoRA layers
    for name, module, found in layers(model):
        entries = report.bases if module in inside else report.layers
        entries.append(_entry(name, module, found, plan, dry_run))
        base: Any = getattr(module, "get_base_layer", None)
        if base is not None:
            inside.add(base())
    for name, module in model.named_modules():
        across = examine_block(module) if mlp else None
        if across is None and (block or is_between(module)):
            across = examine_between(module)
        if across is not None:
            report.blocks.append(_entry(name, module, across, plan, dry_run))
        found_loss = examine_loss(module) if loss or fused.has(module, LossModel) else None
        if found_loss is not None:
            report.losses.append(_entry(name, module, found_loss, plan, dry_run))
        prefix = examine_prefix(module)
        if prefix is not None:
            report.prefixes.append(_entry(name, module, prefix, plan, dry_run))
    if dry_run:
        return report
    # Once more with a patch in place, for layers that have come since.
    checkpointed = [
        (module, mixin)
        for prefix in report.prefixes
        for module, mixin in prefix_layers(prefix._module())
        if fused.record_of(module) is None
    ]
    # Nothing above has touched the model, and `fuse_all` leaves it as it was where it cannot go through.
    lazy: dict[nn.Module, type[fused.Fused]] = {
        head: head_mixin(head) for entry in report.losses for head in _heads(entry)
    }
    swaps: list[tuple[nn.Module, type[fused.Fused], Record]] = []
    for module, _, found in plan:
        assert found.mixin is not None
        swaps.append((module, lazy.pop(module, found.mixin), Record(facts=found.facts)))
    fused.fuse_all(
        swaps
        + [(head, mixin, Record()) for head, mixin in lazy.items() if fused.record_of(head) is None]
        + [(module, mixin, Record()) for module, mixin in checkpointed]
    )
    for (_, layer, _), (_, _, record) in zip(plan, swaps, strict=True):
        layer.record = record
    return report


def _entry(
    name: str,
    module: nn.Module,
    found: Finding,
    plan: list[tuple[nn.Module, LayerReport, Finding]],
    dry_run: bool,
) -> LayerReport:
    record = fused.record_of(module)
    planned = dry_run and record is None and found.mixin is not None
    entry = LayerReport(name, found.kind, record, planned, found.reason, weakref.ref(module))
    if record is None and found.mixin is not None and fused.replaced(module) is None:
        plan.append((module, entry, found))
    return entry


def _heads(entry: LayerReport) -> list[nn.Module]:
    """What makes the logits of a model whose loss is computed without."""
    return judge_loss.heads(entry._module()) if not entry.as_found else []


def unpatch(model: nn.Module) -> int:
    """Take the fused forwards out again. Returns the number of modules restored."""
    _check_model(model, "unpatch")
    return sum(fused.restore(module) for module in model.modules())


@contextmanager
def patched(
    model: nn.Module, mlp: bool = True, loss: bool = False, block: bool = False
) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches inside the block; layers that were patched before stay so."""
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
    """Without a model: the back ends, whether they are usable here, and why not. Of a model: what of it runs
    fused as it is now, and what does not and why, in words; nothing is changed."""
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
