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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import testing
from peft_kernels.core.backends import cpu

from ..lib import harness, report
from ..lib.adapted import SMOLLM2
from ..lib.cases import PEFT_ON_BNB
from ..lib.report import OURS, Spread
from . import model

COUNTS = (0, 1, 2)
GOALS = {1: 2.0, 2: 2.5}
"""By number of neighbours: our step / the quiet one, at most. On two cores fair shares are 1.5 and 2."""
SIZES = model.ModelSizes(SMOLLM2, layers=6, vocabulary=49152)
"""The first layers of SmolLM2-135M: with all, a step of stock PEFT takes more than a minute."""
ROUNDS = {OURS: 3, PEFT_ON_BNB: 1}

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


class Key(NamedTuple):
    contender: str
    neighbours: int


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

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Slowed:
        progress("build")
        step = model.step(self.batch, self.tokens, self.dtype, self.sizes)
        found = harness.Result(step)
        admitted = harness.admitted(step.build(), found, progress)
        slowed = Slowed(self, found.wrong, found.absent, found.remarks, errors=found.errors)
        if OURS in slowed.wrong:
            return slowed
        rounds = {name: min(least, timing.rounds) for name, least in ROUNDS.items()}
        for count in COUNTS:
            with neighbours(count, self.session == "other"):
                for contender in admitted:
                    progress(f"{contender.name}, {count} neighbours")
                    slowed.seconds[Key(contender.name, count)] = _timed(contender, rounds[contender.name])
        return slowed


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


@dataclass
class Slowed(report.Outcome):
    case: Case
    seconds: dict[Key, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def contenders(self) -> list[str]:
        return report.unique(key.contender for key in self.seconds)

    def slowdown(self, contender: str, count: int) -> Spread | None:
        """Time of steps with neighbours / the median without."""
        if not {Key(contender, 0), Key(contender, count)} <= self.seconds.keys():
            return None
        quiet = Spread.of(self.seconds[Key(contender, 0)]).median
        return Spread.of([s / quiet for s in self.seconds[Key(contender, count)]])

    def goals(self) -> Iterator[tuple[str, bool | None]]:
        for count, limit in GOALS.items():
            found = self.slowdown(OURS, count)
            measured = "-" if found is None else f"{found.median:.2f}"
            text = f"{OURS}, {count} busy neighbours / quiet: at most {limit:g}, measured {measured}"
            yield text, None if found is None else found.median <= limit

    def parts(self) -> Iterator[str]:
        if OURS in self.wrong:
            yield report.WRONG
        for name in self.contenders:
            times = [f"{found.median:.2f}" for n in COUNTS[1:] if (found := self.slowdown(name, n))]
            yield f"{name} {self.milliseconds(name, 0)} ms quiet, {' and '.join(times)} times that"

    def milliseconds(self, name: str, count: int) -> str:
        return report.three_digits(Spread.of(self.seconds[Key(name, count)]).median * 1e3)

    def data(self) -> dict[str, Any]:
        return {
            "group": "busy",
            "session": self.case.session,
            "layers": self.case.sizes.layers,
            "dtype": self.case.dtype,
            "times_ms": {
                name: {str(n): report.rounded(Spread.of(self.seconds[Key(name, n)]), 1e3) for n in COUNTS}
                for name in self.contenders
            },
            "slowdown": {
                name: {str(n): report.rounded(found) for n in COUNTS[1:] if (found := self.slowdown(name, n))}
                for name in self.contenders
            },
            "errors": self.errors,
        }

    @classmethod
    def tables(cls, outcomes: Sequence[Slowed], unit: str) -> Iterator[tuple[str, str]]:
        rows = []
        for slowed in outcomes:
            for name in slowed.contenders:
                found = [slowed.slowdown(name, n) for n in COUNTS[1:]]
                cells = ["-" if spread is None else report.cell(spread) for spread in found]
                rows.append([f"{slowed.case.session} session, {name}", slowed.milliseconds(name, 0), *cells])
        layers = "/".join(report.unique(str(slowed.case.sizes.layers) for slowed in outcomes))
        title = f"training step of {layers} layers of SmolLM2-135M: ms on a quiet machine, and the time with "
        title += "busy neighbours / that"
        yield title, report.table(["neighbours in", "quiet", "1", "2"], rows)


def standard(dtype: str) -> list[Case]:
    return [Case(session, dtype) for session in ("own", "other")]
