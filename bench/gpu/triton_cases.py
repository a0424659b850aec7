"""The Triton kernels as compiled, without a GPU: see triton_code.py. One case is one target."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..lib import report
from ..lib.report import unique

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950", "gfx1100", "gfx1200")


@dataclass(frozen=True)
class Case:
    target: str
    seconds = 60.0

    @property
    def name(self) -> str:
        return f"triton-{self.target}"

    def run(
        self, timing: report.Timing | None = None, progress: report.Progress = lambda phase: None
    ) -> Compiled:
        progress("compile")
        if importlib.util.find_spec("triton") is None:
            return Compiled(self, absent={self.name: "Triton is not installed"})
        triton_code = importlib.import_module(".triton_code", __package__)
        if reason := triton_code.unsupported(self.target):
            return Compiled(self, absent={self.name: reason})
        return Compiled(self, codes=triton_code.compile_all([self.target]))


@dataclass
class Compiled(report.Outcome):
    """What came of a case: code, or in `absent` why there is none."""

    case: Case
    codes: Sequence[Any] = ()

    def line(self) -> str:
        faults = sum(len(code.faults) for code in self.codes)
        counted = f"{len(self.codes)} kernels, {faults} beyond their limits"
        return "; ".join([*self.absent.values(), *([counted] if self.codes else [])])

    def data(self) -> dict[str, Any]:
        told = ("registers", "shared", "warps", "spills", "matrix", "faults")
        kernels = [
            {name: getattr(code.variant, name) for name in ("kernel", "config", "types")}
            | {name: getattr(code, name) for name in told}
            for code in self.codes
        ]
        return {"group": "triton", "kernels": kernels}

    @classmethod
    def tables(cls, outcomes: Sequence[Compiled], unit: str) -> Iterator[tuple[str, str]]:
        """A kernel with one of its configs in a row: the largest of what it comes to for arguments of several
        types, and the fewest warps. Warps are those that a multiprocessor holds at once, spills are bytes of
        a thread in local memory, matrix instructions are for tensor cores."""
        titles = ("", "config", "variants", "registers", "shared", "warps", "spills", "matrix", "")
        for found in outcomes:
            alike: dict[tuple[str, str], list[Any]] = {}
            for code in found.codes:
                alike.setdefault((code.variant.kernel, code.variant.config), []).append(code)
            rows = (_row(*name, codes) for name, codes in sorted(alike.items(), key=lambda item: item[0]))
            if found.codes:
                yield f"Triton kernels as compiled for {found.case.target}", report.table(titles, rows)


def _row(kernel: str, config: str, codes: Sequence[Any]) -> list[str]:
    return [
        kernel,
        config,
        str(len(codes)),
        str(max(code.registers for code in codes)),
        f"{max(code.shared for code in codes):,}",
        str(min(code.warps for code in codes) or "-"),
        str(max(code.spills for code in codes)),
        str(max(code.matrix for code in codes)),
        "; ".join(unique(fault for code in codes for fault in code.faults)),
    ]


def standard() -> list[Case]:
    return [Case(target) for target in TARGETS]
