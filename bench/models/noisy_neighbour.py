"""A training step while other processes use the same cores, compared with a quiet machine: ours, and PEFT
on bitsandbytes.

The neighbours are single-threaded busy loops. With autogroups (/proc/self/autogroup) Linux divides cores
among sessions first, so neighbours run in the session of the training, as jobs from the same terminal do, and
in another session, as the job of another user.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import testing
from peft_kernels.core.backends import cpu

from ..lib import harness, report
from ..lib.adapted import SMOLLM2
from ..lib.cases import PEFT_ON_BNB
from ..lib.report import OURS, Progress, Spread, Timing
from . import model

COUNTS = (0, 1, 2)
SIZES = model.ModelSizes(SMOLLM2, layers=6, vocabulary=49152)
"""The first layers of SmolLM2-135M: with all, a step of stock PEFT takes more than a minute."""
ROUNDS = {OURS: 3, PEFT_ON_BNB: 1}
QUIET = "quiet, ms"
FORMS = {QUIET: ".0f", **{str(count): "" for count in COUNTS[1:]}}

# The first forks the others; each ends when the process that started it does.
NEIGHBOURS = """
import os, sys
if os.getpgrp() != os.getpid():
    os.setpgrp()
for _ in range(int(sys.argv[1]) - 1):
    if os.fork() == 0:
        break
print("started", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1000000):
        pass
"""


@contextlib.contextmanager
def neighbours(count: int, is_other_session: bool) -> Iterator[int | None]:
    """Runs busy processes in one process group and yields its id."""
    if count == 0:
        yield None
        return
    command = [sys.executable, "-S", "-c", NEIGHBOURS, str(count)]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/", start_new_session=is_other_session)
    try:
        assert leader.stdout
        for _ in range(count):
            if not leader.stdout.readline():
                raise RuntimeError(f"busy neighbours: expected {count}, not all started")
        yield leader.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.kill()  # if it had no group yet
        leader.wait()


@dataclass(frozen=True)
class Case:
    session: str
    dtype: str
    sizes: model.ModelSizes = SIZES
    batch: int = 4
    tokens: int = 256
    seconds: float = 120.0

    @property
    def name(self) -> str:
        return f"busy-{self.session}-session-{self.batch}x{self.tokens}-{self.dtype}"

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> report.Figures:
        progress("build")
        step = model.step(self.batch, self.tokens, self.dtype, self.sizes)
        checked = harness.Result(step)
        admitted = harness.admitted(step.build(), checked, progress)
        title = f"a training step of {self.sizes.layers} layers of SmolLM2-135M, and its time with busy "
        title += "neighbours / that without"
        reasons = checked.wrong, checked.absent, checked.remarks
        found = report.Figures(self, *reasons, title, FORMS, f"{self.session} session")
        times: dict[str, list[list[float]]] = {contender.name: [] for contender in admitted}
        for count in COUNTS if OURS not in found.wrong else ():
            with neighbours(count, self.session == "other"):
                for contender in admitted:
                    progress(f"{contender.name}, {count} neighbours")
                    rounds = min(ROUNDS[contender.name], timing.rounds)
                    times[contender.name].append(_timed(contender, rounds))
        compare(times, found)
        return found


def compare(times: Mapping[str, Sequence[Sequence[float]]], found: report.Figures) -> None:
    """Adds the seconds of each contender's steps by number of neighbours."""
    for name, (quiet, *others) in ((name, by_count) for name, by_count in times.items() if by_count):
        median = Spread.of(quiet).median
        slowed = {str(n): Spread.of([s / median for s in some]) for n, some in enumerate(others, 1)}
        found.values[name] = {QUIET: 1e3 * median, **slowed}


@contextlib.contextmanager
def default_spinning() -> Iterator[None]:
    """Undoes that our kernels stop torch's threads from spinning on a busy machine, which would help the
    peer."""
    if testing.unavailable("cpu"):
        yield
        return
    cpu.BACKEND.extension.set_busy(False)
    try:
        yield
    finally:
        cpu.BACKEND.extension.set_busy(None)


def _timed(contender: harness.Contender, rounds: int) -> list[float]:
    """Seconds of single steps. One step of ours before them detects the neighbours."""
    found = []
    with contextlib.nullcontext() if contender.name == OURS else default_spinning():
        if contender.name == OURS:
            contender.calls[0]()
        for _ in range(rounds):
            started = time.perf_counter()
            contender.calls[0]()
            found.append(time.perf_counter() - started)
    return found


def standard(dtype: str) -> list[Case]:
    return [Case(session, dtype) for session in ("own", "other")]
