"""The compiled kernels and their limits, without a GPU: CUDA (sass.py), and Triton (triton_code.py).

One case is one architecture.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..lib import report
from ..lib.report import ONCE, Progress, Timing, silent, unique
from . import limits, sass

MET = "met"
TRITON_TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950", "gfx1100", "gfx1200")
Row = dict[str, str]


@dataclass(frozen=True)
class Case:
    group: str
    target: str
    read: Callable[[str], list[Row] | str]
    """A row per kernel, with its faults at the end, or why it cannot be compiled."""
    seconds = 60.0

    @property
    def name(self) -> str:
        return f"{self.group}-{self.target}"

    def run(self, timing: Timing = ONCE, progress: Progress = silent) -> Compiled:
        progress("compile")
        found = self.read(self.target)
        return (
            Compiled(self, absent={self.name: found})
            if isinstance(found, str)
            else Compiled(self, rows=found)
        )


@dataclass
class Compiled(report.Outcome):
    case: Case
    rows: Sequence[Row] = field(default_factory=list)

    def parts(self) -> Iterator[str]:
        if self.rows:
            faults = sum(row["faults"] not in ("", MET) for row in self.rows)
            yield f"{len(self.rows)} kernels, {faults} beyond their limits"

    def data(self) -> dict[str, Any]:
        return {"group": self.case.group, "kernels": self.rows}

    @classmethod
    def tables(cls, outcomes: Sequence[Compiled], unit: str) -> Iterator[tuple[str, str]]:
        for found in outcomes:
            if found.rows:
                rows = report.table(list(found.rows[0]), (list(row.values()) for row in found.rows))
                yield f"kernels as compiled for {found.case.target}", rows


def cuda(target: str) -> list[Row] | str:
    """Instructions per weight are along the shortest and the longest path once through the main loop."""
    tools, files = sass.tools(), sass.sources()
    if not files:
        return f"no sources in {sass.SOURCES}"
    if isinstance(tools, str):
        return tools
    architecture = int(target.removeprefix("sm"))
    try:
        kernels = sass.read(tools, sass.compile_all(tools, files, [architecture]))
    except RuntimeError as error:
        if "is not defined for option 'gpu-name'" not in str(error):
            raise
        return f"{tools.ptxas or tools.nvcc} is too old for {target}"
    return [cuda_row(limits.check(kernel)) for kernel in sorted(kernels, key=lambda kernel: kernel.name)]


def cuda_row(finding: limits.Finding) -> Row:
    kernel, limit = finding.kernel, finding.rule and finding.rule.limit
    counts = [f"{value:.2f}" for value in (finding.least, finding.per_weight) if value is not None]
    return {
        "kernel": kernel.name,
        "registers": str(kernel.registers),
        "by role": ", ".join(f"{role.used} of {role.registers}" for role in limits.roles(kernel)),
        "shared": f"{kernel.shared:,}",
        "warps": str(finding.warps),
        "instr/weight": "-".join(unique(counts)),
        "at most": "" if limit is None else f"{limit:g}",
        "faults": "; ".join(finding.faults) or (MET if finding.rule else ""),
    }


def triton(target: str) -> list[Row] | str:
    """One kernel and config per row: the largest value over argument dtypes, and the fewest warps. Warps are
    those resident on a multiprocessor, spills are bytes of local memory per thread, matrix instructions are
    those for tensor cores."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton_code = importlib.import_module(".triton_code", __package__)
    if reason := triton_code.unsupported(target):
        return str(reason)
    return triton_rows(triton_code.compile_all([target]))


def triton_rows(codes: Sequence[Any]) -> list[Row]:
    alike: dict[tuple[str, str], list[Any]] = {}
    for code in codes:
        alike.setdefault((code.variant.kernel, code.variant.config), []).append(code)
    return [_triton_row(*name, alike[name]) for name in sorted(alike)]


def _triton_row(kernel: str, config: str, codes: Sequence[Any]) -> Row:
    return {
        "kernel": kernel,
        "config": config,
        "variants": str(len(codes)),
        "registers": str(max(code.registers for code in codes)),
        "shared": f"{max(code.shared for code in codes):,}",
        "warps": str(min(code.warps for code in codes) or "-"),
        "spills": str(max(code.spills for code in codes)),
        "matrix": str(max(code.matrix for code in codes)),
        "faults": "; ".join(unique(fault for code in codes for fault in code.faults)),
    }


def standard(dtype: str) -> list[Case]:
    return [
        *(Case("sass", f"sm{architecture}", cuda) for architecture in sass.ARCHITECTURES),
        *(Case("triton", target, triton) for target in TRITON_TARGETS),
    ]
