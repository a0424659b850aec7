"""Results of cases of every kind: one protocol, and from it tables, notes and the summary."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

OURS = "ours"
"""Name of the contender that the others are compared with."""
LOSES, WRONG = "LOSES", "WRONG"

T = TypeVar("T")


class Timing(NamedTuple):
    """How long to time a case: until both are reached."""

    seconds: float = 3.0
    rounds: int = 5


ONCE = Timing(0.0, 1)


Progress = Callable[[str], None]


def silent(phase: str) -> None:
    """Progress that is not shown."""


class AnyCase(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> float:
        """Estimated run time on two cores, without timing."""

    def run(self, timing: Timing, progress: Progress) -> Outcome: ...


class Spread(NamedTuple):
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(values, method="inclusive") if values[1:] else values * 3
        return cls(median, q1, q3)

    @classmethod
    def of_ratios(cls, over: Iterable[float], under: Iterable[float]) -> Spread:
        return cls.of([one / other for one, other in zip(over, under, strict=True)])


@dataclass
class Outcome:
    """The result of a case. Contenders may be wrong or absent, each with a reason."""

    case: Any
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """The result in one line."""
        reasons = {**self.absent, **self.remarks, **self.wrong}
        return "; ".join([*self.parts(), *(f"{name}: {reason}" for name, reason in reasons.items())])

    def parts(self) -> Iterable[str]:
        """What `line` says before the reasons."""
        return ()

    def data(self) -> dict[str, Any]:
        """The fields of the JSON line."""
        raise NotImplementedError

    @classmethod
    def tables(cls, outcomes: Sequence[Any], unit: str) -> Iterator[tuple[str, str]]:
        """Title and text of the tables over all outcomes of this kind."""
        raise NotImplementedError

    def ratios(self) -> Mapping[str, Spread]:
        """Time of each peer / our time."""
        return {}


@dataclass
class Figures(Outcome):
    """Numbers by row and column, of a case that does more than time contenders."""

    title: str = ""
    """Of the table, which cases with the same title share."""
    forms: Mapping[str, str] = field(default_factory=dict)
    """The columns, and how their numbers are formatted: if empty, with three digits."""
    label: str = ""
    """Of the rows of this case in the table."""
    values: dict[str, dict[str, float | Spread]] = field(default_factory=dict)

    def value(self, row: str, column: str) -> float | None:
        """A number, or the median of a spread."""
        found = self.values.get(row, {}).get(column)
        return found.median if isinstance(found, Spread) else found

    def cell(self, row: str, column: str) -> str:
        found = self.values[row].get(column)
        if found is None or isinstance(found, Spread):
            return cell(found) if found else "-"
        return f"{found:{self.forms[column]}}" if self.forms[column] else three_digits(found)

    def parts(self) -> Iterator[str]:
        for row, found in self.values.items():
            cells = ", ".join(f"{column} {self.cell(row, column)}" for column in found)
            yield f"{row}: {cells}" if row else cells

    def data(self) -> dict[str, Any]:
        values = {
            row: {name: rounded(x) if isinstance(x, Spread) else x for name, x in found.items()}
            for row, found in self.values.items()
        }
        return {"group": self.case.name.partition("-")[0], "values": values}

    @classmethod
    def tables(cls, outcomes: Sequence[Figures], unit: str) -> Iterator[tuple[str, str]]:
        for title in unique(one.title for one in outcomes if one.values):
            members = [one for one in outcomes if one.title == title]
            cells: dict[str, dict[str, str]] = {}
            for one in members:
                for row, found in one.values.items():
                    name = ", ".join(filter(None, (one.label, row)))
                    cells.setdefault(name, {}).update({column: one.cell(row, column) for column in found})
            columns = unique(column for one in members for column in one.forms)
            rows = ([name, *(found.get(column, "-") for column in columns)] for name, found in cells.items())
            yield title, table(["", *columns], rows)


def json_data(outcome: Outcome, facts: Mapping[str, Any]) -> dict[str, Any]:
    reasons = {"wrong": outcome.wrong, "absent": outcome.absent, "remarks": outcome.remarks}
    return {"name": outcome.case.name, **outcome.data(), **reasons, **facts}


def render(outcomes: Sequence[Outcome], unit: str = "ms") -> str:
    """All tables, the reasons for missing values and the summary."""
    blocks = []
    for kind in unique(map(type, outcomes)):
        found = kind.tables([outcome for outcome in outcomes if type(outcome) is kind], unit)
        blocks += [f"{title}\n{cells}" for title, cells in found]
    for lines in (_notes(outcomes), summary(outcomes)):
        if lines:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """The number of cells that win, and each one that loses."""
    cells = [(o.case.name, peer, ratio) for o in outcomes for peer, ratio in o.ratios().items()]
    lost = [f"  {LOSES} {name} against {peer}: {cell(r)}" for name, peer, r in cells if loses(r)]
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    if not cells and not wrong:
        return []
    more = f"; {wrong} with a wrong result" if wrong else ""
    return [f"{len(cells)} cells: {len(cells) - len(lost)} win, {len(lost)} lose{more}", *lost]


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Reasons for WRONG and `-`, and remarks, each once with the cases it is about."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        for word, found in ((f"{WRONG} ", outcome.wrong), ("- ", outcome.absent), ("", outcome.remarks)):
            for name, reason in found.items():
                reasons.setdefault(f"{word}{name}: {reason}", []).append(outcome.case.name)
    more = {reason: f" and {len(names) - 3} more" if names[3:] else "" for reason, names in reasons.items()}
    return [f"{reason} ({', '.join(names[:3])}{more[reason]})" for reason, names in reasons.items()]


def loses(ratio: Spread) -> bool:
    return ratio.median < 1.0


def cell(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.q1:.2f}-{ratio.q3:.2f})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def grid(cells: Mapping[tuple[str, tuple[int, str]], str]) -> str:
    """A table of cells by row title and (position, title) of the column. Missing cells are blank."""
    columns = sorted(unique(column for _, column in cells))
    rows = unique(row for row, _ in cells)
    return table(
        ["", *(title for _, title in columns)],
        ([row, *(cells.get((row, column), "") for column in columns)] for row in rows),
    )


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def missing(needs: str) -> str:
    """Which of the libraries are not installed, or an empty string."""
    absent = [library for library in needs.split() if importlib.util.find_spec(library) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def rounded(values: Spread, scale: float = 1.0) -> dict[str, float]:
    return {name: float(f"{value * scale:.5g}") for name, value in values._asdict().items()}


def unique(items: Iterable[T]) -> list[T]:
    """In order of first appearance."""
    return list(dict.fromkeys(items))
