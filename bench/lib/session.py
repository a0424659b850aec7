"""Runs cases one after the other, shows progress and writes their results."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import report
from .harness import first_line
from .report import AnyCase, Outcome, Progress, Timing

INTERRUPTED = 130


@dataclass
class Done:
    outcomes: list[Any] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def status(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        return 1 if self.failed or any(outcome.wrong for outcome in self.outcomes) else 0

    def render(self, *more: str, unit: str = "ms") -> str:
        """All tables, then `more`, then failed and skipped cases."""
        blocks = [*([report.render(self.outcomes, unit).rstrip()] if self.outcomes else []), *more]
        blocks += [f"FAILED {name}: {reason}" for name, reason in self.failed.items()]
        if self.left_out:
            blocks.append(f"left out, {len(self.left_out)} cases: {', '.join(self.left_out)}")
        return "\n\n".join(blocks) + "\n"


def run(
    chosen: Sequence[AnyCase],
    measure: Callable[[Any, Progress], Outcome],
    lines: Path,
    facts: Mapping[str, Any],
    limit: float = float("inf"),
    lost: Callable[[], bool] = lambda: False,
) -> Done:
    """Runs the cases, except those that would not end within `limit` seconds, and writes a JSON line for each
    to the file `lines` at once. A case that raises does not stop the others, unless the device is lost."""
    done, started = Done(), time.perf_counter()
    with open(lines, "w", encoding="utf-8") as file:
        for number, case in enumerate(chosen, 1):
            if time.perf_counter() - started + case.seconds > limit:
                done.left_out.append(case.name)
                continue
            head = f"[{number:>{len(str(len(chosen)))}}/{len(chosen)}] {case.name}: "
            try:
                outcome = measure(case, partial(_show, head))
            except KeyboardInterrupt:  # earlier results are still reported
                done.interrupted = True
                done.left_out += [case.name for case in chosen[number - 1 :]]
                break
            except Exception as error:
                traceback.print_exc()
                done.failed[case.name] = text = f"{type(error).__name__}: {first_line(error)}"
            else:
                done.outcomes.append(outcome)
                file.write(json.dumps(report.json_data(outcome, facts)) + "\n")
                file.flush()
                text = outcome.line()
            _show("", "")
            print(head + text, flush=True)
            if done.failed and lost():
                done.left_out += [case.name for case in chosen[number:]]
                break
    return done


def estimate(chosen: Sequence[AnyCase], timing: Timing, limit: float) -> str:
    seconds = sum(case.seconds + timing.seconds for case in chosen)
    end = f"; cases that would not end within {limit:.0f} s are left out" if limit < float("inf") else ""
    return f"{len(chosen)} cases, about {seconds / 60:.1f} minutes on two quiet cores{end}"


def _show(head: str, phase: str) -> None:
    """Shows progress on a terminal, replacing the last text."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{head}{phase}", end="", flush=True)
