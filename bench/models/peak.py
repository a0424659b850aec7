"""Peak resident memory of a process in a training step, compared with stock PEFT.

Each contender makes the model of `model.py` and takes one step in a fresh process. The high-water mark is
reset in between, as making a model of random weights takes more than loading one. Everything resident counts:
Python, torch, the model and the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from ..lib import report
from ..lib.cases import DTYPES, PEFT_ON_BNB
from ..lib.harness import first_line
from ..lib.layers import BNB
from ..lib.machine import status_bytes
from ..lib.report import OURS, megabytes, missing
from .model import SMOLLM2_135M, STEP, TEXTBOOK, Models, ModelSizes

CONTENDERS = (OURS, PEFT_ON_BNB)
GOAL = 0.4
"""Our peak / stock's, at most."""
CLOSE = 0.02
"""Relative difference of the gradients' norm from stock's, at most."""


class Peak(NamedTuple):
    """Bytes of one step, and the norm of its gradients."""

    resident: int
    floor: int
    """Resident before the step."""
    norm: float


@dataclass(frozen=True)
class Case:
    """One of the two training steps of model.py, with its samples and tokens."""

    group: str
    batch: int
    tokens: int
    dtype: str
    sizes: ModelSizes = SMOLLM2_135M
    seconds = 90.0

    @property
    def name(self) -> str:
        return f"peak-{self.group}-{self.batch}x{self.tokens}-{self.dtype}"

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Peaks:
        """One step each, whatever the timing: a peak hardly varies."""
        found = Peaks(self)
        if reason := missing("peft transformers"):
            found.absent[OURS] = reason
            return found
        for name in CONTENDERS:
            progress(name)
            if reason := missing(BNB if name == PEFT_ON_BNB or self.group == TEXTBOOK else ""):
                found.absent[name] = reason
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    found.peaks[name] = pool.submit(step_alone, self, name).result()
                except Exception as error:  # the others still run
                    found.wrong[name] = f"{type(error).__name__}: {first_line(error)}"
        found.check()
        return found


@dataclass
class Peaks(report.Outcome):
    case: Case
    peaks: dict[str, Peak] = field(default_factory=dict)

    def check(self) -> None:
        """Marks steps whose gradients differ from stock's as wrong, and drops their memory."""
        stock = self.peaks.get(PEFT_ON_BNB)
        for name, peak in list(self.peaks.items()):
            if stock is not None and not abs(peak.norm - stock.norm) <= CLOSE * stock.norm:
                self.wrong[name] = f"norm of the gradients {peak.norm:.4g}, stock's {stock.norm:.4g}"
                del self.peaks[name]

    @property
    def fraction(self) -> float | None:
        """Ours / stock's."""
        ours, stock = self.peaks.get(OURS), self.peaks.get(PEFT_ON_BNB)
        return None if ours is None or stock is None else ours.resident / stock.resident

    def goals(self) -> Iterator[tuple[str, bool]]:
        if (found := self.fraction) is not None:
            yield f"{OURS} / {PEFT_ON_BNB}: at most {GOAL:.0%}, measured {found:.1%}", found <= GOAL

    def parts(self) -> list[str]:
        return [f"{name} {megabytes(peak.resident)}" for name, peak in self.peaks.items()]

    def data(self) -> dict[str, Any]:
        peaks = {name: peak._asdict() for name, peak in self.peaks.items()}
        return {"group": "peak", "peaks": peaks, "fraction": self.fraction}

    @classmethod
    def tables(cls, outcomes: Sequence[Peaks], unit: str) -> Iterator[tuple[str, str]]:
        rows = []
        for outcome in outcomes:
            stock = outcome.peaks.get(PEFT_ON_BNB)
            for name, peak in outcome.peaks.items():
                share = "-" if stock is None else f"{peak.resident / stock.resident:.1%}"
                cells = [megabytes(peak.resident), megabytes(peak.floor), share]
                rows.append([outcome.case.name.removeprefix("peak-"), name, *cells])
        titles = ["", "", "peak", "before", f"/ {PEFT_ON_BNB}"]
        yield "peak resident memory of a process in a training step", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    longer = [Case(STEP, 1, tokens, dtype) for tokens in (1024, 2048, 4096, 8192)]
    return [*(Case(group, 8, 512, dtype) for group in (STEP, TEXTBOOK)), *longer]


def step_alone(case: Case, name: str) -> Peak:
    models = Models(case.sizes, DTYPES[case.dtype])
    if case.group == TEXTBOOK:
        model = models.textbook("bnb", name == OURS)
    else:
        model = models.ours() if name == OURS else models.stock()
    take = models.textbook_step if case.group == TEXTBOOK else models.step
    take(model, models.tokens(1, 16))()  # one-time allocations
    models.free_weights()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed after making the model, which malloc keeps
    Path("/proc/self/clear_refs").write_text("5")
    floor = status_bytes("VmRSS")
    gradients = take(model, models.tokens(case.batch, case.tokens))()["gradients"]
    return Peak(status_bytes("VmHWM"), floor, float(gradients.norm()))
