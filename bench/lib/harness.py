"""Correctness checks and interleaved timing of the contenders of a case.

A turn calls one contender often enough to be measurable, each call on the next copy of its weights. In each
round every contender has one turn (A B C A B C ...), and ratios are taken within a round, so a slow second of
the machine slows both sides.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import report
from .correctness import Expected
from .layers import LayerCache
from .report import OURS, WRONG, Spread, Timing, three_digits, unique

MIN_TURN = 1e-3  # seconds of timed calls per turn
SETTLE_BELOW = 5e-3  # shorter calls are affected by the contender before: the first of a turn is not timed
LONG = 0.1  # seconds; much longer than any interruption
MAX_ROUNDS = 1000
MIB = 2**20
ROTATION_LIMIT = 1024 * MIB  # bytes, of all contenders of a case

Clock = Callable[[], float]
Verify = Callable[[Any], float]
"""Takes the result of a call; returns the error to report. AssertionError when the result is wrong."""
Turn = Callable[[], float]
"""Calls a contender several times and returns the seconds per call."""


@dataclass
class Contender:
    """One implementation. `calls` do the same work on different copies of the weights."""

    name: str
    calls: Sequence[Callable[[], Any]]
    verify: Verify
    remark: Callable[[], str] = lambda: ""


TakeTurns = Callable[[Sequence[Contender]], dict[str, Turn]]
"""Warms contenders up and returns the turn of each by name."""


@dataclass
class Absent:
    name: str
    reason: str


Contenders = list[Contender | Absent]
Build = Callable[[], Sequence[Contender | Absent]]


@dataclass
class Entry:
    """A contender to build: `make` returns its layers (or calls), one per copy of the weights."""

    name: str
    make: Callable[[], Sequence[Any]]
    verify: Verify
    needs: str = ""
    call: Callable[[Any], Callable[[], Any]] | None = None
    """How one of its layers is called, if not as those of the other entries."""
    remark: Callable[[Any], str] = lambda layer: ""


def contenders(
    entries: Sequence[Entry],
    call: Callable[[Any], Callable[[], Any]] = lambda layer: layer,
    cache: LayerCache | None = None,
) -> Contenders:
    """Builds the entries; an entry that cannot be built is absent. `cache` keeps layers for later cases."""
    built: Contenders = []
    for entry in entries:
        if reason := report.missing(entry.needs):
            built.append(Absent(entry.name, reason))
            continue
        try:
            layers = entry.make() if cache is None else cache.get(entry.name, entry.make)
        except Exception as error:  # the others still run
            built.append(Absent(entry.name, f"{type(error).__name__}: {first_line(error)}"))
            continue
        calls = [(entry.call or call)(layer) for layer in layers]
        built.append(Contender(entry.name, calls, entry.verify, partial(entry.remark, layers[0])))
    return built


def compared(wanted: Expected, makes: Mapping[str, Callable[[], Any]], needs: str = "") -> Contenders:
    """Contenders of one call each, which `makes` makes. Ours is held to the bounds of the tests."""
    verify = {name: wanted.strict if name == OURS else wanted.sane for name in makes}
    return contenders(
        [Entry(name, lambda make=make: [make()], verify[name], needs) for name, make in makes.items()]
    )


@dataclass(frozen=True)
class Case:
    """One problem to time. `build` makes the contenders, ours among them."""

    group: str
    out_features: int
    in_features: int
    m: int | None
    dtype: str
    build: Build
    batch: int | None = None
    """Of a block: the samples that the M rows belong to."""
    yardsticks: Sequence[str] = ()
    """Contenders that are no peers but cheaper jobs of ours, which the cost of this one is relative to."""
    title: str = ""
    seconds: float = 1.0
    needs: str = ""
    """Import names of libraries, separated by spaces, without which the case does not run."""

    @property
    def shape(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    @property
    def rows(self) -> str:
        """`M=4`, or samples x tokens."""
        if self.m is None or self.batch is None:
            return "" if self.m is None else f"M={self.m}"
        return f"{self.batch}x{self.m // self.batch}"

    @property
    def name(self) -> str:
        rows = self.rows.lower().replace("=", "")
        return "-".join(part for part in (self.group, self.shape, rows, self.dtype) if part)

    def run(
        self,
        timing: Timing,
        progress: report.Progress = report.silent,
        clock: Clock = time.perf_counter,
        take_turns: TakeTurns | None = None,
    ) -> Result:
        """Checks every contender, then times the correct ones. If ours is wrong, nothing is timed."""
        progress("build")
        result = Result(self)
        if reason := report.missing(self.needs):
            return Result(self, contenders=[OURS], wrong={OURS: reason})
        runners = admitted(self.build(), result, progress)
        if OURS in result.wrong:
            return result
        progress("time")
        result.seconds = interleave(runners, timing, clock, take_turns)
        result.remarks |= {runner.name: remark for runner in runners if (remark := runner.remark())}
        return result

    def check(self) -> Result:
        """Checks ours and times nothing."""
        result = Result(self)
        admitted([contender for contender in self.build() if contender.name == OURS], result)
        return result


@dataclass
class Result(report.Outcome):
    """A contender has `seconds`, or a reason in `wrong` or `absent`."""

    case: Case
    contenders: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per call, one entry per round
    errors: dict[str, float] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contenders if name not in (OURS, *self.case.yardsticks)]

    def time(self, name: str) -> Spread | None:
        return Spread.of(self.seconds[name]) if name in self.seconds else None

    def against(self, name: str) -> Spread | None:
        """Over the rounds: time of a peer / our time, or our time / that of a yardstick. None if either was
        not timed."""
        if not {OURS, name} <= self.seconds.keys():
            return None
        over, under = (OURS, name) if name in self.case.yardsticks else (name, OURS)
        return Spread.of_ratios(self.seconds[over], self.seconds[under])

    def ratios(self) -> dict[str, Spread]:
        return {peer: ratio for peer in self.peers if (ratio := self.against(peer)) is not None}

    def cell(self, name: str) -> str:
        """`1.83 (1.80-1.90)`, with LOSES where it does; WRONG; or `-` if the other is absent."""
        ratio = self.against(name)
        if ratio is None:
            return WRONG if OURS in self.wrong or name in self.wrong else "-"
        return report.cell(ratio) + (f" {report.LOSES}" if name in self.peers and report.loses(ratio) else "")

    def line(self) -> str:
        ours = self.time(OURS)
        if ours is None:
            wrong = [f"{WRONG}: {reason}" for reason in self.wrong.values()]
            return "; ".join([*wrong, *(f"error {error:.2g}" for error in self.errors.values())])
        parts = [f"{OURS} {three_digits(ours.median * 1e3)} ms"]
        parts += [
            f"{name} {self.cell(name).partition(' (')[0]}" for name in (*self.peers, *self.case.yardsticks)
        ]
        return "; ".join([", ".join(parts), *(f"{name}: {remark}" for name, remark in self.remarks.items())])

    def data(self) -> dict[str, Any]:
        case = self.case
        times = {name: report.rounded(Spread.of(values), 1e3) for name, values in self.seconds.items()}
        costs = {name: cost for name in self.case.yardsticks if (cost := self.against(name)) is not None}
        return {
            "group": case.group,
            "shape": [case.out_features, case.in_features],
            "m": case.m,
            "batch": case.batch,
            "dtype": case.dtype,
            "times_ms": times,
            "ratios": {name: report.rounded(ratio) for name, ratio in self.ratios().items()},
            "costs": {name: report.rounded(cost) for name, cost in costs.items()},
            "errors": {name: float(f"{error:.4g}") for name, error in self.errors.items()},
            "rounds": max(map(len, self.seconds.values()), default=0),
            "copies": self.copies,
        }

    @classmethod
    def tables(cls, outcomes: Sequence[Result], unit: str) -> Iterator[tuple[str, str]]:
        """For each group the times, and the ratios to each contender, by shape and rows of x."""
        for group in unique(result.case.group for result in outcomes):
            members = [result for result in outcomes if result.case.group == group]
            dtypes = "/".join(unique(result.case.dtype for result in members))
            title = f"{members[0].case.title or group}, {dtypes}"
            times = {
                (f"{result.case.shape} {name}", result.column): result.time_cell(name, UNITS[unit])
                for shape in unique(result.case.shape for result in members)
                for name in unique(name for result in members for name in result.contenders)
                for result in members
                if result.case.shape == shape
            }
            yield f"{title}: {unit} per call, median", report.grid(times)
            for peer in unique(peer for result in members for peer in result.peers):
                yield f"{title}: time of {peer} / {OURS}", ratio_table(members, peer)
            for name in unique(name for result in members for name in result.case.yardsticks):
                yield f"{title}: cost, time of {OURS} / {name}", ratio_table(members, name)

    @property
    def column(self) -> tuple[int, str]:
        return self.case.m or 0, self.case.rows

    def time_cell(self, name: str, scale: float) -> str:
        time = self.time(name)
        if time is None:
            return WRONG if name in self.wrong else "-"
        return three_digits(time.median * scale)


UNITS = {"ms": 1e3, "us": 1e6}


def ratio_table(results: Sequence[Result], name: str) -> str:
    return report.grid({(result.case.shape, result.column): result.cell(name) for result in results})


def admitted(
    contenders: Sequence[Contender | Absent], result: Result, progress: report.Progress = report.silent
) -> list[Contender]:
    """The contenders that may be timed; the result says why others may not."""
    found = []
    for contender in contenders:
        result.contenders.append(contender.name)
        progress(f"check {contender.name}")
        if admit(contender, result) and isinstance(contender, Contender):
            found.append(contender)
    return found


def admit(contender: Contender | Absent, result: Result) -> bool:
    """Whether the contender may be timed. A peer that raises is absent; ours is then wrong."""
    name = contender.name
    missing = result.wrong if name == OURS else result.absent
    if isinstance(contender, Absent):
        missing[name] = contender.reason
        return False
    try:
        output = contender.calls[0]()
    except Exception as error:
        missing[name] = f"{type(error).__name__}: {first_line(error)}"
        return False
    try:
        result.errors[name] = contender.verify(output)
    except AssertionError as error:
        result.wrong[name] = first_line(error)
        return False
    finally:
        if remark := contender.remark():
            result.remarks[name] = remark
    result.copies[name] = len(contender.calls)
    return True


def interleave(
    contenders: Sequence[Contender],
    timing: Timing,
    clock: Clock = time.perf_counter,
    take_turns: TakeTurns | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry per round, until both limits of `timing` are reached."""
    turns = take_turns(contenders) if take_turns else {c.name: clocked_turn(c, clock) for c in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = clock(), 0
        while done < MAX_ROUNDS and (done < timing.rounds or clock() - start < timing.seconds):
            for name, turn in turns.items():
                seconds[name].append(turn())
            done += 1
    finally:
        if collecting:
            gc.enable()
    return seconds


def clocked_turn(contender: Contender, clock: Clock) -> Turn:
    """Warms the contender up and returns its turn by the clock."""
    calls = itertools.cycle(contender.calls)

    def timed(count: int) -> float:
        batch = list(itertools.islice(calls, count))
        start = clock()
        for call in batch:
            call()
        return (clock() - start) / count

    next(calls)()
    # The minimum of three, so that one interruption does not make a short call look long.
    estimate = timed(1)
    if estimate < LONG:
        estimate = max(min(estimate, timed(1), timed(1)), 1e-9)
    count = math.ceil(MIN_TURN / estimate)

    def turn() -> float:
        if estimate < SETTLE_BELOW:
            next(calls)()
        return timed(count)

    return turn


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the largest cache in sysfs; 32 MiB if there is none."""
    sizes = (_bytes(path.read_text()) for path in root.glob("cpu0/cache/index*/size"))
    return max(sizes, default=0) or 32 * MIB


def copies(nbytes: int, contenders: int, cache: int | None = None) -> int:
    """Number of copies of a weight to rotate through.

    Twice the last-level cache, so that each call finds its copy evicted, as in a model with many layers; at
    most the contender's share of ROTATION_LIMIT.
    """
    wanted = 2 * (last_level_cache() if cache is None else cache)
    share = ROTATION_LIMIT // max(contenders, 1)
    return max(1, min(math.ceil(wanted / nbytes), share // nbytes))


def _bytes(size: str) -> int:
    number, unit = size.strip()[:-1], size.strip()[-1:]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(number) * units[unit] if unit in units else int(size.strip() or 0)
