"""The CUDA kernels as compiled, without a GPU: see sass.py. One case is one architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..lib import report
from ..lib.report import MET, three_digits, unique
from . import limits, sass
from . import roofline as floors
from .limits import Finding
from .roofline import BY_ARCHITECTURE, Gpu


@dataclass(frozen=True)
class Case:
    architecture: int
    seconds = 60.0

    @property
    def name(self) -> str:
        return f"sass-sm{self.architecture}"

    @property
    def gpu(self) -> Gpu:
        """The card that the counts are put beside."""
        return BY_ARCHITECTURE[self.architecture]

    def run(
        self, timing: report.Timing | None = None, progress: report.Progress = lambda phase: None
    ) -> Compiled:
        progress("compile")
        tools, files = sass.tools(), sass.sources()
        if not files:
            return Compiled(self, absent={self.name: f"no sources in {sass.SOURCES}"})
        if isinstance(tools, str):
            return Compiled(self, absent={self.name: tools})
        kernels = sass.read(tools, sass.compile_all(tools, files, [self.architecture]))
        found = sorted(map(limits.judge, kernels), key=lambda finding: finding.kernel.name)
        return Compiled(self, findings=found)


@dataclass
class Compiled(report.Outcome):
    """What came of a case: findings, or in `absent` why there are none."""

    case: Case
    findings: Sequence[Finding] = ()

    def line(self) -> str:
        faults = sum(len(finding.faults) for finding in self.findings)
        counted = f"{len(self.findings)} kernels, {faults} beyond their limits"
        return "; ".join([*self.absent.values(), *([counted] if self.findings else [])])

    def data(self) -> dict[str, Any]:
        kernels = [
            {
                "kernel": finding.kernel.name,
                "registers": finding.kernel.registers,
                "shared": finding.kernel.shared,
                "warps": finding.warps,
                "per_weight": [finding.least, finding.per_weight],
                "per_matrix": finding.per_matrix,
                "around": finding.around,
                "limit": finding.rule and finding.rule.limit,
                "issue_slots": slots(finding, self.case.gpu),
                "matrix_peak": matrix_peak(finding, self.case.gpu),
                "faults": finding.faults,
            }
            for finding in self.findings
        ]
        return {"group": "sass", "kernels": kernels}

    @classmethod
    def tables(cls, outcomes: Sequence[Compiled], unit: str) -> Iterator[tuple[str, str]]:
        """A kernel in a row. Instructions for a weight are on the shortest way once through the main loop,
        and on the longest; all else is on the shortest.

        Slots: the part of the issue slots that it takes while it keeps the memory busy. Peak: the part of the
        matrix peak that the issue slots leave it. Around: further instructions, once round the loop around.
        """
        counted = ("instr/weight", "at most", "slots", "instr/mma", "peak", "around")
        titles = ("", "registers", "shared", "warps", *counted, "")
        for found in outcomes:
            gpu = found.case.gpu
            if found.findings:
                kernels = report.table(titles, (_row(finding, gpu) for finding in found.findings))
                yield f"kernels as compiled for sm_{gpu.architecture}, beside {gpu.name}", kernels
                yield f"floors of {gpu.name}: us, m(emory) or c(ompute) bound", floors_table(gpu)


def _row(finding: Finding, gpu: Gpu) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    kernel, limit = finding.kernel, finding.rule and finding.rule.limit
    ways = [f"{value:.2f}" for value in (finding.least, finding.per_weight) if value is not None]
    return [
        kernel.name,
        str(kernel.registers),
        f"{kernel.shared:,}",
        str(finding.warps),
        "-".join(unique(ways)),
        cell(limit, "g"),
        cell(slots(finding, gpu), ".0%"),
        cell(finding.per_matrix, ".1f"),
        cell(matrix_peak(finding, gpu), ".0%"),
        cell(finding.around or None, "d"),
        "; ".join(finding.faults) or (MET if finding.rule else ""),
    ]


def floors_table(gpu: Gpu) -> str:
    """The shortest times that the card allows, by shape and number of rows of x."""
    rows = []
    for n, k in floors.SHAPES:
        times = [gpu.linear(n, k, m) for m in floors.ROWS]
        times += [(gpu.dequantize(n, k), "m"), gpu.linear(n, k, 1, weight_bytes=2)]
        rows.append([f"{n}x{k}", *(f"{three_digits(seconds * 1e6)} {bound}" for seconds, bound in times)])
    return report.table(["", *(f"M={m}" for m in floors.ROWS), "dequantise", "dense M=1"], rows)


def standard() -> list[Case]:
    return [Case(architecture) for architecture in sass.ARCHITECTURES]


def slots(finding: Finding, gpu: Gpu) -> float | None:
    """The part of the issue slots that a kernel takes while it keeps the memory busy: above 1 it cannot."""
    if finding.least is None or finding.rule is None:
        return None
    return gpu.slots(finding.least, finding.rule.read + finding.rule.written)


def matrix_peak(finding: Finding, gpu: Gpu) -> float | None:
    """The part of the matrix peak that the issue slots leave."""
    return finding.per_matrix and min(1.0, gpu.matrix_cycles / finding.per_matrix)
