"""Bytes that a forward saves for its backward: PEFT's and ours. They are exact, so each is measured once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import testing

from ..lib import layers, report
from ..lib.adapted import SMOLLM2, Sizes, Variant
from ..lib.block import Blocks
from ..lib.cases import DTYPES, PEFT_ON_BNB, PEFT_ON_DENSE
from ..lib.harness import first_line
from ..lib.layers import BNB, Weights
from ..lib.report import OURS, Progress, Timing, missing

LAYER, BLOCK = "layer", "block"
VARIANTS = {"lora": Variant(), "dropout": Variant(dropout=0.05), "dora": Variant(dora=True)}
BASES = ("dense", "nf4")
BATCH, TOKENS = 4, 256
RATIO = f"{OURS} / PEFT"
FORMS = {"PEFT": ",.0f", OURS: ",.0f", RATIO: ".1%"}


@dataclass(frozen=True)
class Case:
    """One kind of adapter on one kind of base, in a layer (the block's gate_proj) or the whole block."""

    subject: str
    base: str
    adapter: str
    dtype: str
    sizes: Sizes = SMOLLM2

    @property
    def name(self) -> str:
        return "-".join(("memory", self.subject, self.base, self.adapter, self.dtype))

    @property
    def peer(self) -> str:
        return PEFT_ON_BNB if self.base == "nf4" else PEFT_ON_DENSE

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.adapter]

    seconds = 1.0

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> Saved:
        label = self.name.removeprefix("memory-")
        saved = Saved(self, title="saved for backward, bytes per token", forms=FORMS, label=label)
        row = saved.values.setdefault("", {})
        measure_one = _of_layer if self.subject == LAYER else _of_block
        for name in (self.peer, OURS):
            progress(name)
            if reason := missing(f"peft transformers {BNB if name == PEFT_ON_BNB else ''}"):
                saved.absent[name] = reason
                continue
            try:
                nbytes = measure_one(saved, name) / (BATCH * TOKENS)
            except Exception as error:  # the other still runs
                saved.absent[name] = f"{type(error).__name__}: {first_line(error)}"
            else:
                row[OURS if name == OURS else "PEFT"] = nbytes
        if not saved.absent:
            row[RATIO] = row[OURS] / row["PEFT"]
        return saved


class Saved(report.Figures):
    @property
    def ratio(self) -> float | None:
        """Ours / PEFT's."""
        return self.value("", RATIO)


def standard(dtype: str) -> list[Case]:
    return [Case(*parts, dtype) for parts in itertools.product((LAYER, BLOCK), BASES, VARIANTS)]


def _of_layer(saved: Saved, name: str) -> int:
    case = saved.case
    weights = layers.shared(Weights, LAYER, case.sizes.intermediate, case.sizes.hidden, DTYPES[case.dtype])
    if case.base == "dense":
        bases = layers.dense_linears(weights, 1)
    elif name == OURS:
        bases = layers.nf4_linears(weights, 1)
    else:
        bases = layers.bnb_linears(weights, 1, "train")
    (layer,) = layers.peft_loras(bases, weights, patch=name == OURS, **case.variant.options)
    x = weights.x(BATCH * TOKENS).requires_grad_()
    return testing.saved_bytes(partial(layer, x), itertools.chain(layer.parameters(), layer.buffers()))


def _of_block(saved: Saved, name: str) -> int:
    case = saved.case
    blocks = layers.shared(Blocks, BLOCK, case.sizes, DTYPES[case.dtype])
    model = blocks.ours(case.variant) if name == OURS else blocks.stock(case.variant)
    inputs = blocks.inputs(BATCH, TOKENS)
    run = partial(blocks.forward(model, case.variant, inputs), inputs.x)
    # All blocks of a model share the sines and cosines of the positions.
    there: tuple[Iterable[Tensor], ...] = (model.model.parameters(), model.model.buffers(), inputs.position)
    nbytes = testing.saved_bytes(run, itertools.chain(*there))
    if remark := model.remark():
        saved.remarks[name] = remark
    return nbytes
