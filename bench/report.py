"""The tables and the JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .cases import TITLES
from .harness import OURS, Result, Spread

LOSES = "LOSES"
WRONG = "WRONG"

T = TypeVar("T")
Cell = tuple[str, ...]
"""Lines of text."""


def json_line(result: Result, facts: Mapping[str, Any]) -> str:
    """Everything about one case: times in ms per call, ratios peer / ours, errors, reasons, the machine."""
    case = result.case
    times = {name: result.time(name) for name in result.contenders}
    ratios = {peer: result.ratio(peer) for peer in result.peers}
    return json.dumps(
        {
            "name": case.name,
            "group": case.group,
            "shape": [case.out_features, case.in_features],
            "m": case.m,
            "dtype": case.dtype,
            "times_ms": {name: _spread(time, 1e3) for name, time in times.items() if time is not None},
            "ratios": {peer: _spread(ratio) for peer, ratio in ratios.items() if ratio is not None},
            "errors": {name: float(f"{error:.4g}") for name, error in result.errors.items()},
            "wrong": result.wrong,
            "absent": result.absent,
            "rounds": result.rounds,
            "copies": result.copies,
            **facts,
        }
    )


def progress_line(result: Result) -> str:
    """A case in one line: our time, and the ratios."""
    time = result.time(OURS)
    if time is None:
        return f"{WRONG}: {result.wrong[OURS]}"
    parts = [f"{OURS} {_milliseconds(time.median)} ms"]
    return ", ".join(parts + [f"{peer} {ratio_cell(result, peer)[0]}" for peer in result.peers])


def render(results: Sequence[Result]) -> str:
    """All tables, the reasons for what is missing, and the summary."""
    blocks = []
    for group in unique(result.case.group for result in results):
        members = [result for result in results if result.case.group == group]
        title = f"{TITLES[group]}, {'/'.join(unique(result.case.dtype for result in members))}"
        blocks.append(f"{title}: ms per call, median\n{times_table(members)}")
        for peer in unique(peer for result in members for peer in result.peers):
            blocks.append(f"{title}: time of {peer} / {OURS}\n{ratio_table(members, peer)}")
    return "\n\n".join([*blocks, *_notes(results), summary(results)]) + "\n"


def ratio_table(results: Sequence[Result], peer: str) -> str:
    """Rows are shapes, columns are numbers of rows of x. Under each ratio its quartiles over the rounds."""
    return _grid({(result.case.shape, result.case.m): ratio_cell(result, peer) for result in results})


def times_table(results: Sequence[Result]) -> str:
    cells: dict[tuple[str, int | None], Cell] = {}
    for shape in unique(result.case.shape for result in results):
        members = [result for result in results if result.case.shape == shape]
        for name in unique(name for result in members for name in result.contenders):
            for result in members:
                cells[f"{shape} {name}", result.case.m] = (_time_cell(result, name),)
    return _grid(cells)


def ratio_cell(result: Result, peer: str) -> Cell:
    """`1.83` over its quartiles; `0.83 LOSES`; WRONG; or `-` when the peer is absent."""
    ratio = result.ratio(peer)
    if ratio is None:
        return (WRONG if OURS in result.wrong or peer in result.wrong else "-",)
    mark = f" {LOSES}" if loses(ratio) else ""
    return f"{ratio.median:.2f}{mark}", f"{ratio.q1:.2f}-{ratio.q3:.2f}"


def loses(ratio: Spread) -> bool:
    return ratio.median < 1.0


def losing(results: Iterable[Result]) -> list[str]:
    """A line of text for each cell in which a peer is faster."""
    found = []
    for result in results:
        for peer in result.peers:
            ratio = result.ratio(peer)
            cell = ratio_cell(result, peer)
            if ratio is not None and loses(ratio):
                found.append(f"{result.case.name} against {peer}: {ratio.median:.2f} ({cell[1]})")
    return found


def summary(results: Sequence[Result]) -> str:
    """How many cells win, and all that lose."""
    total = sum(result.ratio(peer) is not None for result in results for peer in result.peers)
    lost, wrong = losing(results), [result for result in results if result.wrong]
    text = f"{total} cells: {total - len(lost)} win, {len(lost)} lose"
    if wrong:
        text += f"; {len(wrong)} with a wrong result"
    return "\n".join([text, *(f"  {LOSES} {line}" for line in lost)])


def _notes(results: Sequence[Result]) -> list[str]:
    """What WRONG and `-` stand for, each reason once."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        for word, found in ((WRONG, result.wrong), ("-", result.absent)):
            for name, reason in found.items():
                reasons.setdefault(f"{word} {name}: {reason}", []).append(result.case.name)
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{reason} ({', '.join(names[:3])}{more})")
    return ["\n".join(lines)] if lines else []


def _time_cell(result: Result, name: str) -> str:
    time = result.time(name)
    if time is None:
        return WRONG if name in result.wrong else "-"
    return _milliseconds(time.median)


def _milliseconds(seconds: float) -> str:
    """Three digits."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def _grid(cells: Mapping[tuple[str, int | None], Cell]) -> str:
    """Lay cells out by row title and M. What was not measured is blank."""
    rows = unique(row for row, _ in cells)
    columns = sorted(unique(m for _, m in cells), key=lambda m: m or 0)
    lines: list[Sequence[str]] = [["", *("" if m is None else f"M={m}" for m in columns)]]
    for row in rows:
        found = [cells.get((row, m), ()) for m in columns]
        for i in range(max(map(len, found))):
            lines.append([row if i == 0 else "", *(cell[i] if i < len(cell) else "" for cell in found)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join(line for line in padded if line)


def _spread(values: Spread, scale: float = 1.0) -> dict[str, float]:
    return {name: float(f"{value * scale:.5g}") for name, value in values._asdict().items()}


def unique(items: Iterable[T]) -> list[T]:
    """In order of first appearance."""
    return list(dict.fromkeys(items))
