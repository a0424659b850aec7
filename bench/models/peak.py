"""Peak resident memory of a process in a training step, compared with stock PEFT.

Each contender makes the model of `model.py` and takes one step in a fresh process. The high-water mark is
reset in between, as making a model of random weights takes more than loading one. Everything resident counts:
Python, torch, the model and the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from ..lib import report
from ..lib.cases import DTYPES, PEFT_ON_BNB
from ..lib.harness import first_line
from ..lib.layers import BNB
from ..lib.machine import status_bytes
from ..lib.report import OURS, Progress, Timing, missing
from .model import SMOLLM2_135M, STEP, TEXTBOOK, Models, ModelSizes

CONTENDERS = (OURS, PEFT_ON_BNB)
CLOSE = 0.02
"""Relative difference of the gradients' norm from stock's, at most."""
TITLE = "peak resident memory of a process in a training step"
SHARE = f"/ {PEFT_ON_BNB}"
FORMS = {"MB": ",.0f", "before, MB": ",.0f", SHARE: ".1%"}


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

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> report.Figures:
        """One step each, whatever the timing: a peak hardly varies."""
        label = self.name.removeprefix("peak-")
        found = report.Figures(self, title=TITLE, forms=FORMS, label=label)
        if reason := missing("peft transformers"):
            found.absent[OURS] = reason
            return found
        peaks = {}
        for name in CONTENDERS:
            progress(name)
            if reason := missing(BNB if name == PEFT_ON_BNB or self.group == TEXTBOOK else ""):
                found.absent[name] = reason
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    peaks[name] = pool.submit(step_alone, self, name).result()
                except Exception as error:  # the others still run
                    found.wrong[name] = f"{type(error).__name__}: {first_line(error)}"
        compare(peaks, found)
        return found


def compare(peaks: Mapping[str, Peak], found: report.Figures) -> None:
    """Adds the peaks, but not of a step whose gradients differ from stock's."""
    stock = peaks.get(PEFT_ON_BNB)
    for name, peak in peaks.items():
        if stock is not None and not abs(peak.norm - stock.norm) <= CLOSE * stock.norm:
            found.wrong[name] = f"norm of the gradients {peak.norm:.4g}, stock's {stock.norm:.4g}"
            continue
        share = {SHARE: peak.resident / stock.resident} if stock else {}
        found.values[name] = {"MB": peak.resident / 1e6, "before, MB": peak.floor / 1e6, **share}


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
