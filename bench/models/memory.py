"""Bytes that a forward saves for its backward: PEFT's and ours. They are exact, so each is measured once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

import testing

from ..lib import layers, report
from ..lib.adapted import SMOLLM2, Sizes, Variant
from ..lib.block import Blocks
from ..lib.cases import DTYPES, PEFT_ON_BNB, PEFT_ON_DENSE
from ..lib.harness import first_line
from ..lib.layers import BNB, RANK, Weights
from ..lib.report import OURS, missing

LAYER, BLOCK = "layer", "block"
VARIANTS = {"lora": Variant(), "dropout": Variant(dropout=0.05), "dora": Variant(dora=True)}
BASES = ("dense", "nf4")
GOAL = 0.6
"""Bytes of our block / PEFT's, at most."""
BATCH, TOKENS = 4, 256
H_BYTES = 4  # x A^T is in fp32


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

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Saved:
        saved = Saved(self)
        measure_one = _of_layer if self.subject == LAYER else _of_block
        for name in (OURS, self.peer):
            progress(name)
            if reason := missing(f"peft transformers {BNB if name == PEFT_ON_BNB else ''}"):
                saved.absent[name] = reason
                continue
            try:
                saved.bytes_per_token[name] = measure_one(saved, name) / (BATCH * TOKENS)
            except Exception as error:  # the other still runs
                saved.absent[name] = f"{type(error).__name__}: {first_line(error)}"
        return saved


@dataclass
class Saved(report.Outcome):
    case: Case
    bytes_per_token: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours / PEFT's."""
        return None if self.absent else self.bytes_per_token[OURS] / self.bytes_per_token[self.case.peer]

    def goals(self) -> Iterator[tuple[str, bool]]:
        case, ours = self.case, self.bytes_per_token.get(OURS)
        if case.subject == BLOCK and self.ratio is not None:
            text = f"{OURS} / {case.peer}: at most {GOAL:.0%}, measured {self.ratio:.1%}"
            yield text, self.ratio <= GOAL
        if case.subject == LAYER and case.variant == Variant() and ours is not None:
            least = case.sizes.hidden * DTYPES[case.dtype].itemsize + RANK * H_BYTES
            yield f"{OURS}: x and x A^T, {least:,} bytes, measured {ours:,.0f}", ours == least

    def parts(self) -> list[str]:
        return [f"{name} {nbytes:.0f}" for name, nbytes in self.bytes_per_token.items()]

    def data(self) -> dict[str, Any]:
        case = self.case
        return {
            "group": "memory",
            "shape": [case.sizes.hidden, case.sizes.intermediate],
            "dtype": case.dtype,
            "bytes_per_token": self.bytes_per_token,
            "ratio": self.ratio,
        }

    @classmethod
    def tables(cls, outcomes: Sequence[Saved], unit: str) -> Iterator[tuple[str, str]]:
        rows = []
        for saved in outcomes:
            found = [saved.bytes_per_token.get(name) for name in (saved.case.peer, OURS)]
            ratio = "-" if saved.ratio is None else f"{saved.ratio:.1%}"
            cells = ["-" if nbytes is None else f"{nbytes:,.0f}" for nbytes in found]
            rows.append([saved.case.name.removeprefix("memory-"), *cells, ratio])
        yield "saved for backward, bytes per token", report.table(["", "PEFT", OURS, f"{OURS} / PEFT"], rows)


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
