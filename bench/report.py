"""The tables and the JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from . import compiled, floors, triton_cases
from .cases import TITLES
from .compiled import Compiled
from .harness import OURS, Result, Spread
from .memory import Saved

LOSES = "LOSES"
WRONG = "WRONG"
MET, MISSED = "met", "MISSED"

UNITS = {"ms": 1e3, "us": 1e6}

T = TypeVar("T")
Cell = tuple[str, ...]
"""Lines of text."""
Column = tuple[int, str]
"""Its place, by the number of rows of x, and its title."""


def json_line(result: Result, facts: Mapping[str, Any]) -> str:
    """Everything about one case: times in ms per call, ratios peer / ours, errors, reasons, the machine."""
    case = result.case
    times = {name: result.time(name) for name in result.contenders}
    ratios = {peer: result.ratio(peer) for peer in result.peers}
    costs = {name: result.cost(name) for name in result.yardsticks}
    return json.dumps(
        {
            "name": case.name,
            "group": case.group,
            "shape": [case.out_features, case.in_features],
            "m": case.m,
            "batch": case.batch,
            "dtype": case.dtype,
            "times_ms": {name: _spread(time, 1e3) for name, time in times.items() if time is not None},
            "ratios": {peer: _spread(ratio) for peer, ratio in ratios.items() if ratio is not None},
            "costs": {name: _spread(cost) for name, cost in costs.items() if cost is not None},
            "goals": {goal.against: {"limit": goal.limit, "cost": goal.cost} for goal in case.goals},
            "errors": {name: float(f"{error:.4g}") for name, error in result.errors.items()},
            "wrong": result.wrong,
            "absent": result.absent,
            "remarks": result.remarks,
            "rounds": result.rounds,
            "copies": result.copies,
            **facts,
        }
    )


def saved_json_line(saved: Saved, facts: Mapping[str, Any]) -> str:
    """The same about saved bytes."""
    case = saved.case
    return json.dumps(
        {
            "name": case.name,
            "group": "memory",
            "shape": [case.sizes.hidden, case.sizes.intermediate],
            "dtype": case.dtype,
            "bytes_per_token": saved.bytes_per_token,
            "ratio": saved.ratio,
            "goal": saved.goal(),
            "absent": saved.absent,
            "remarks": saved.remarks,
            **facts,
        }
    )


def compiled_json_line(result: Compiled, facts: Mapping[str, Any]) -> str:
    """The same about kernels as compiled."""
    return json.dumps(
        {
            "name": result.case.name,
            "group": "sass",
            "kernels": [
                {
                    "kernel": finding.kernel.name,
                    "registers": finding.kernel.registers,
                    "shared": finding.kernel.shared,
                    "warps": finding.warps,
                    "per_weight": [finding.least, finding.per_weight],
                    "per_matrix": finding.per_matrix,
                    "around": finding.around,
                    "limit": finding.rule and finding.rule.limit,
                    "issue_slots": compiled.slots(finding, result.case.gpu),
                    "matrix_peak": compiled.matrix_peak(finding, result.case.gpu),
                    "faults": finding.faults,
                }
                for finding in result.findings
            ],
            "absent": result.absent,
            **facts,
        }
    )


def triton_json_line(result: triton_cases.Compiled, facts: Mapping[str, Any]) -> str:
    """The same about Triton kernels as compiled."""
    kernels = [
        {
            "kernel": code.variant.kernel,
            "config": code.variant.config,
            "types": code.variant.types,
            "registers": code.registers,
            "shared": code.shared,
            "warps": code.warps,
            "spills": code.spills,
            "matrix": code.matrix,
            "faults": code.faults,
        }
        for code in result.codes
    ]
    return json.dumps(
        {"name": result.case.name, "group": "triton", "kernels": kernels, "absent": result.absent, **facts}
    )


def progress_line(result: Result) -> str:
    """A case in one line: our time, and the ratios."""
    time = result.time(OURS)
    if time is None:
        return f"{WRONG}: {result.wrong[OURS]}"
    parts = [f"{OURS} {three_digits(time.median * UNITS['ms'])} ms"]
    parts += [f"{peer} {ratio_cell(result, peer)[0]}" for peer in result.peers]
    parts += [f"cost beside {name} {ratio_cell(result, name)[0]}" for name in result.yardsticks]
    return "; ".join([", ".join(parts), *(f"{name}: {remark}" for name, remark in result.remarks.items())])


def saved_progress_line(saved: Saved) -> str:
    parts = [f"{name} {nbytes:.0f}" for name, nbytes in saved.bytes_per_token.items()]
    parts += [f"{name}: {reason}" for name, reason in (saved.absent | saved.remarks).items()]
    return "; ".join(parts)


def compiled_progress_line(result: Compiled) -> str:
    counted = f"{len(result.findings)} kernels, {len(result.faults)} beyond their limits"
    return "; ".join([*result.absent.values(), *([counted] if result.findings else [])])


def triton_progress_line(result: triton_cases.Compiled) -> str:
    faults = sum(len(code.faults) for code in result.codes)
    counted = f"{len(result.codes)} kernels, {faults} beyond their limits"
    return "; ".join([*result.absent.values(), *([counted] if result.codes else [])])


def render(
    results: Sequence[Result],
    saved: Sequence[Saved] = (),
    kernels: Sequence[Compiled] = (),
    triton: Sequence[triton_cases.Compiled] = (),
    unit: str = "ms",
) -> str:
    """All tables, the reasons for what is missing, the goals and the summary."""
    blocks = []
    for group in unique(result.case.group for result in results):
        members = [result for result in results if result.case.group == group]
        title = f"{TITLES[group]}, {'/'.join(unique(result.case.dtype for result in members))}"
        blocks.append(f"{title}: {unit} per call, median\n{times_table(members, unit)}")
        for peer in unique(peer for result in members for peer in result.peers):
            blocks.append(f"{title}: time of {peer} / {OURS}\n{ratio_table(members, peer)}")
        for name in unique(name for result in members for name in result.yardsticks):
            blocks.append(f"{title}: cost, time of {OURS} / {name}\n{ratio_table(members, name)}")
    if saved:
        blocks.append(f"saved for backward, bytes per token\n{saved_table(saved)}")
    for item in kernels:
        if item.findings:
            gpu = item.case.gpu
            blocks.append(
                f"kernels as compiled for sm_{gpu.architecture}, beside {gpu.name}\n{compiled_table(item)}"
            )
            blocks.append(f"floors of {gpu.name}: us, m(emory) or c(ompute) bound\n{floors_table(gpu)}")
    for found in triton:
        if found.codes:
            blocks.append(f"Triton kernels as compiled for {found.case.target}\n{triton_table(found)}")
    blocks += _notes([*results, *saved, *kernels, *triton])
    if goals := [*_goal_lines(results), *_saved_goal_lines(saved)]:
        blocks.append("\n".join(["Goals", *(f"  {line}" for line in goals)]))
    return "\n\n".join([*blocks, *([summary(results)] if results else [])]) + "\n"


def ratio_table(results: Sequence[Result], name: str) -> str:
    """Rows are shapes, columns are numbers of rows of x. Under each ratio its quartiles over the rounds."""
    return grid({(result.case.shape, column(result)): ratio_cell(result, name) for result in results})


def saved_table(saved: Sequence[Saved]) -> str:
    lines: list[Sequence[str]] = [["", "PEFT", OURS, f"{OURS} / PEFT"]]
    for item in saved:
        case, found = item.case, item.bytes_per_token
        bytes_ = [f"{found[name]:,.0f}" if name in found else "-" for name in (case.peer, OURS)]
        ratio = "-" if item.ratio is None else f"{item.ratio:.1%}"
        lines.append([case.name.removeprefix("memory-"), *bytes_, ratio])
    return _aligned(lines)


def compiled_table(result: Compiled) -> str:
    """A kernel in a row. Instructions for a weight are on the shortest way once through the main loop, and on
    the longest; all else is on the shortest.

    Slots: the part of the issue slots that it takes while it keeps the memory busy. Peak: the part of the
    matrix peak that the issue slots leave it. Around: further instructions, once round the loop around.
    """
    counted = ("instr/weight", "at most", "slots", "instr/mma", "peak", "around")
    titles = ("registers", "shared", "warps", *counted, "")
    lines: list[Sequence[str]] = [["", *titles]]
    for finding in result.findings:
        kernel, limit = finding.kernel, finding.rule and finding.rule.limit
        ways = [f"{value:.2f}" for value in (finding.least, finding.per_weight) if value is not None]
        columns = [
            str(kernel.registers),
            f"{kernel.shared:,}",
            str(finding.warps),
            "-".join(unique(ways)),
            _cell(limit, "g"),
            _cell(compiled.slots(finding, result.case.gpu), ".0%"),
            _cell(finding.per_matrix, ".1f"),
            _cell(compiled.matrix_peak(finding, result.case.gpu), ".0%"),
            _cell(finding.around or None, "d"),
            "; ".join(finding.faults) or (MET if finding.rule else ""),
        ]
        lines.append([kernel.name, *columns])
    return _aligned(lines)


def triton_table(result: triton_cases.Compiled) -> str:
    """A kernel with one of its configs in a row: the largest of what it comes to for arguments of several
    types, and the fewest warps. Warps are those that a multiprocessor holds at once, spills are bytes of a
    thread in local memory, matrix instructions are for tensor cores."""
    titles = ("config", "variants", "registers", "shared", "warps", "spills", "matrix", "")
    lines: list[Sequence[str]] = [["", *titles]]
    for kernel, config in sorted({(code.variant.kernel, code.variant.config) for code in result.codes}):
        codes = [
            code for code in result.codes if (code.variant.kernel, code.variant.config) == (kernel, config)
        ]
        columns = [
            str(len(codes)),
            str(max(code.registers for code in codes)),
            f"{max(code.shared for code in codes):,}",
            str(min(code.warps for code in codes) or "-"),
            str(max(code.spills for code in codes)),
            str(max(code.matrix for code in codes)),
            "; ".join(unique(fault for code in codes for fault in code.faults)),
        ]
        lines.append([kernel, config, *columns])
    return _aligned(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def floors_table(gpu: floors.Gpu) -> str:
    """The shortest times that the card allows, by shape and number of rows of x."""
    titles = [*(f"M={m}" for m in floors.ROWS), "dequantise", "dense M=1"]
    lines: list[Sequence[str]] = [["", *titles]]
    for n, k in floors.SHAPES:
        times = [gpu.linear(n, k, m) for m in floors.ROWS]
        times += [(gpu.dequantize(n, k), "m"), gpu.linear(n, k, 1, weight_bytes=2)]
        lines.append([f"{n}x{k}", *(f"{three_digits(seconds * 1e6)} {bound}" for seconds, bound in times)])
    return _aligned(lines)


def times_table(results: Sequence[Result], unit: str = "ms") -> str:
    cells: dict[tuple[str, Column], Cell] = {}
    for shape in unique(result.case.shape for result in results):
        members = [result for result in results if result.case.shape == shape]
        for name in unique(name for result in members for name in result.contenders):
            for result in members:
                cells[f"{shape} {name}", column(result)] = (_time_cell(result, name, unit),)
    return grid(cells)


def ratio_cell(result: Result, name: str) -> Cell:
    """`1.83` over its quartiles; `0.83 LOSES`; WRONG; or `-` when the peer (or yardstick) is absent."""
    ratio = result.against(name)
    if ratio is None:
        return (WRONG if OURS in result.wrong or name in result.wrong else "-",)
    mark = f" {LOSES}" if name in result.peers and loses(ratio) else ""
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


def _goal_lines(results: Iterable[Result]) -> Iterator[str]:
    """Each goal with what was measured."""
    for result in results:
        for goal in result.case.goals:
            ratio = result.against(goal.against)
            quotient = f"{OURS} / {goal.against}" if goal.cost else f"{goal.against} / {OURS}"
            cell = " ".join(ratio_cell(result, goal.against))
            found = cell if ratio is None else f"{ratio.median:.2f}: {MET if goal.met(ratio) else MISSED}"
            yield f"{result.case.name}, {quotient}: {goal}, measured {found}"


def _saved_goal_lines(saved: Iterable[Saved]) -> Iterator[str]:
    for item in saved:
        if goal := item.goal():
            text, met = goal
            yield f"{item.case.name}, {text}: {MET if met else MISSED}"


def _notes(results: Sequence[Result | Saved | Compiled | triton_cases.Compiled]) -> list[str]:
    """What WRONG and `-` stand for, and what there is to tell about a contender, each once."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        wrong = result.wrong if isinstance(result, Result) else {}
        for word, found in ((f"{WRONG} ", wrong), ("- ", result.absent), ("", result.remarks)):
            for name, reason in found.items():
                reasons.setdefault(f"{word}{name}: {reason}", []).append(result.case.name)
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{reason} ({', '.join(names[:3])}{more})")
    return ["\n".join(lines)] if lines else []


def _time_cell(result: Result, name: str, unit: str) -> str:
    time = result.time(name)
    if time is None:
        return WRONG if name in result.wrong else "-"
    return three_digits(time.median * UNITS[unit])


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def column(result: Result) -> Column:
    return result.case.m or 0, result.case.rows


def grid(cells: Mapping[tuple[str, Column], Cell]) -> str:
    """Lay cells out by row title and column. What was not measured is blank."""
    rows = unique(row for row, _ in cells)
    columns = sorted(unique(column for _, column in cells))
    lines: list[Sequence[str]] = [["", *(title for _, title in columns)]]
    for row in rows:
        found = [cells.get((row, column), ()) for column in columns]
        for i in range(max(map(len, found))):
            lines.append([row if i == 0 else "", *(cell[i] if i < len(cell) else "" for cell in found)])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join(line for line in padded if line)


def _spread(values: Spread, scale: float = 1.0) -> dict[str, float]:
    return {name: float(f"{value * scale:.5g}") for name, value in values._asdict().items()}


def unique(items: Iterable[T]) -> list[T]:
    """In order of first appearance."""
    return list(dict.fromkeys(items))
