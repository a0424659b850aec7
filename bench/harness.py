"""Gate and interleaved timing: the contenders of a case take turns, so that they share the machine's moods.

A turn calls one contender often enough to be measurable, each call on the next copy of its weights. Round
after round every contender has its turn (A B C A B C ...), and a ratio is taken inside each round: a slow
second of the machine slows both sides of it.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

OURS = "ours"
"""Name of the contender that the others are compared with."""

MIN_TURN = 1e-3  # seconds of timed calls in a turn
SETTLE_BELOW = 5e-3  # a call shorter than this still feels the contender before it: the turn starts untimed
MAX_ROUNDS = 1000
MIB = 2**20
ROTATION_LIMIT = 1024 * MIB  # bytes, all contenders of a case together

Clock = Callable[[], float]
Turn = Callable[[], float]
"""Calls a contender some times, and returns the seconds that a call took."""


@dataclass
class Contender:
    """One way to compute the case. `calls` do the same work on different copies of the weights."""

    name: str
    calls: Sequence[Callable[[], Any]]
    verify: Callable[[Any], float]
    """Takes what a call returned; gives the error to report. AssertionError when the result is wrong."""
    remark: Callable[[], str] = lambda: ""
    """What to tell about its calls, if anything."""


TakeTurns = Callable[[Sequence[Contender]], dict[str, Turn]]
"""Warms contenders up, and gives each one's turn by its name."""


@dataclass
class Absent:
    """A contender that cannot take part here."""

    name: str
    reason: str


@dataclass(frozen=True)
class Goal:
    """What our time is to come to beside that of one contender."""

    against: str
    limit: float
    cost: bool = False
    """False: its time / ours, at least `limit`. True: ours / its time, at most `limit`; it is then no peer
    but a cheaper job of ours, and to be slower than that is no loss."""

    def met(self, ratio: Spread) -> bool:
        return ratio.median <= self.limit if self.cost else ratio.median >= self.limit

    def __str__(self) -> str:
        return f"at {'most' if self.cost else 'least'} {self.limit:g}"


@dataclass(frozen=True)
class Case:
    """What is measured once. `build` makes the contenders, ours among them."""

    group: str
    out_features: int
    in_features: int
    m: int | None
    dtype: str
    build: Callable[[], Sequence[Contender | Absent]]
    batch: int | None = None
    """Of a block: the samples that the M rows are split into."""
    goals: Sequence[Goal] = ()

    @property
    def shape(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    @property
    def rows(self) -> str:
        """Of x: `M=4`, or samples x tokens."""
        if self.m is None or self.batch is None:
            return "" if self.m is None else f"M={self.m}"
        return f"{self.batch}x{self.m // self.batch}"

    @property
    def name(self) -> str:
        rows = self.rows.lower().replace("=", "")
        return "-".join(part for part in (self.group, self.shape, rows, self.dtype) if part)


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclass
class Result:
    """What came of a case. A contender has seconds, or a reason in `wrong` or `absent`."""

    case: Case
    contenders: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per call, one entry a round
    errors: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.contenders if name not in (OURS, *self.yardsticks)]

    @property
    def yardsticks(self) -> list[str]:
        """Cheaper jobs of ours, by which the cost of this one is measured."""
        return [goal.against for goal in self.case.goals if goal.cost]

    @property
    def rounds(self) -> int:
        return max((len(values) for values in self.seconds.values()), default=0)

    def time(self, name: str) -> Spread | None:
        return Spread.of(self.seconds[name]) if name in self.seconds else None

    def ratio(self, peer: str) -> Spread | None:
        """Time of the peer / our time, over the rounds: above 1 we win. None when either was not timed."""
        return self._quotient(peer, OURS)

    def cost(self, yardstick: str) -> Spread | None:
        """Our time / time of the yardstick, over the rounds. None when either was not timed."""
        return self._quotient(OURS, yardstick)

    def against(self, name: str) -> Spread | None:
        """The cost beside a yardstick, the ratio of a peer."""
        return self.cost(name) if name in self.yardsticks else self.ratio(name)

    def _quotient(self, over: str, under: str) -> Spread | None:
        if over not in self.seconds or under not in self.seconds:
            return None
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return Spread.of([one / other for one, other in pairs])


def measure(
    case: Case,
    min_seconds: float,
    min_rounds: int,
    clock: Clock = time.perf_counter,
    take_turns: TakeTurns | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Result:
    """Check every contender, then time those that are right. When ours is wrong, nothing is timed."""
    progress("build")
    result = Result(case)
    runners: list[Contender] = []
    for contender in case.build():
        result.contenders.append(contender.name)
        if isinstance(contender, Absent):
            result.absent[contender.name] = contender.reason
            continue
        progress(f"check {contender.name}")
        if admit(contender, result):
            runners.append(contender)
            result.copies[contender.name] = len(contender.calls)
    if OURS in result.absent:
        result.wrong[OURS] = result.absent.pop(OURS)
    if OURS in result.wrong:
        return result
    progress("time")
    result.seconds = interleave(runners, min_seconds, min_rounds, clock, take_turns)
    result.remarks |= {runner.name: remark for runner in runners if (remark := runner.remark())}
    return result


def admit(contender: Contender, result: Result) -> bool:
    """Whether the contender may be timed. A peer that raises is absent; ours is wrong when it raises."""
    name = contender.name
    try:
        output = contender.calls[0]()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        (result.wrong if name == OURS else result.absent)[name] = reason
        return False
    try:
        result.errors[name] = contender.verify(output)
    except AssertionError as error:
        result.wrong[name] = first_line(error)
        return False
    finally:
        if remark := contender.remark():
            result.remarks[name] = remark
    return True


def interleave(
    contenders: Sequence[Contender],
    min_seconds: float,
    min_rounds: int,
    clock: Clock = time.perf_counter,
    take_turns: TakeTurns | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry a round, until both minima are reached.

    Turns go by the clock, unless another way to take them is given.
    """
    turns = take_turns(contenders) if take_turns else {c.name: _turn(c, clock) for c in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for done in itertools.count(1):
            for name, turn in turns.items():
                seconds[name].append(turn())
            if done >= MAX_ROUNDS or (done >= min_rounds and clock() - start >= min_seconds):
                return seconds
    finally:
        if collecting:
            gc.enable()
    raise AssertionError("unreachable")


def _turn(contender: Contender, clock: Clock) -> Turn:
    """A function that takes one turn and returns the seconds per call. Warms the contender up."""
    calls = itertools.cycle(contender.calls)

    def timed(count: int) -> float:
        batch = list(itertools.islice(calls, count))
        start = clock()
        for call in batch:
            call()
        return (clock() - start) / count

    next(calls)()
    # The least of three: one interruption must not make a short call look long.
    estimate = max(min(timed(1) for _ in range(3)), 1e-9)
    count = math.ceil(MIN_TURN / estimate)

    def turn() -> float:
        if estimate < SETTLE_BELOW:
            next(calls)()
        return timed(count)

    return turn


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the largest cache that the kernel reports; 32 MiB when it reports none."""
    sizes = [_bytes(path.read_text()) for path in root.glob("cpu0/cache/index*/size")]
    return max(sizes, default=0) or 32 * MIB


def copies(nbytes: int, contenders: int, cache: int | None = None) -> int:
    """How many copies of a weight to rotate through.

    Twice the last-level cache, so that each call finds its copy evicted, as it is in a model with many
    layers; at most the contender's share of ROTATION_LIMIT; at least one.
    """
    wanted = 2 * (last_level_cache() if cache is None else cache)
    share = ROTATION_LIMIT // max(contenders, 1)
    return max(1, min(math.ceil(wanted / nbytes), share // nbytes))


def _bytes(size: str) -> int:
    number, unit = size.strip()[:-1], size.strip()[-1:]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(number) * units[unit] if unit in units else int(size.strip() or 0)
