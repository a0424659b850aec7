"""The most memory that the process of a training step has at a time, beside stock's.

Each contender makes the model of `model.py` and takes one step of it in a fresh process. The mark of the
most that was resident is set back between the two, as making a model of random weights takes more than
loading one does. All that is resident counts: Python, torch and the model as well as what the step needs.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from ..lib import report
from ..lib.cases import DTYPES, PEFT_ON_BNB
from ..lib.contenders import missing
from ..lib.harness import first_line
from ..lib.layers import BNB
from ..lib.report import OURS
from .model import PATCHED, SMOLLM2_135M, STEP, TEXTBOOK, Models, ModelSizes

CONTENDERS = (OURS, PATCHED, PEFT_ON_BNB)
GOAL = 0.6
"""What our peak is to come to at most, as a fraction of stock's."""
CLOSE = 0.02
"""Norms of the gradients of one model by two ways are this close, relatively."""


class Peak(NamedTuple):
    """Of one step: bytes, and the norm of its gradients."""

    resident: int
    floor: int
    """What was resident before it."""
    norm: float


@dataclass(frozen=True)
class Case:
    """Which of the two scripts of `bench/models/model.py`, and the samples and tokens of its step."""

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
        """One step each: a peak hardly varies, so `timing` has no say."""
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
                except Exception as error:  # whatever one raises, the others are still told
                    found.wrong[name] = f"{type(error).__name__}: {first_line(error)}"
        found.judge()
        return found


@dataclass
class Peaks(report.Outcome):
    """What came of a case."""

    case: Case
    peaks: dict[str, Peak] = field(default_factory=dict)

    def judge(self) -> None:
        """A step whose gradients are not stock's is told as wrong, and its memory is not."""
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

    def line(self) -> str:
        parts = [f"{name} {mb(peak.resident)}" for name, peak in self.peaks.items()]
        return "; ".join([*parts, *(f"{name}: {why}" for name, why in (self.absent | self.wrong).items())])

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
                cells = [mb(peak.resident), mb(peak.floor), share]
                rows.append([outcome.case.name.removeprefix("peak-"), name, *cells])
        titles = ["", "", "peak", "before", f"/ {PEFT_ON_BNB}"]
        yield "the most that the process of a training step has resident", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(group, 8, 512, dtype) for group in (STEP, TEXTBOOK)]


def mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def step_alone(case: Case, name: str) -> Peak:
    """One step of a contender, for a fresh process."""
    models = Models(case.sizes, DTYPES[case.dtype])
    if case.group == TEXTBOOK:
        model = models.textbook("bnb", name != PEFT_ON_BNB, name == OURS)
    else:
        model = {OURS: models.whole, PATCHED: models.ours, PEFT_ON_BNB: models.stock}[name]()
    take = models.textbook_step if case.group == TEXTBOOK else models.step
    take(model, models.tokens(1, 16))()  # what a first step sets up
    models.free_weights()
    ctypes.CDLL(None).malloc_trim(0)  # what making the model has freed, which malloc keeps
    Path("/proc/self/clear_refs").write_text("5")
    floor = _resident("VmRSS")
    gradients = take(model, models.tokens(case.batch, case.tokens))()["gradients"]
    return Peak(_resident("VmHWM"), floor, float(gradients.norm()))


def _resident(field: str) -> int:
    """Bytes, by what Linux says of this process."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
