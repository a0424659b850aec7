"""The kernels as compiled, beside their limits, without a GPU: CUDA (sass.py), and Triton (triton_code.py).

One case is one architecture.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..lib import report
from ..lib.report import MET, ONCE, Progress, Timing, silent, unique
from . import limits, sass
from .limits import Finding
from .roofline import BY_ARCHITECTURE, Gpu

TRITON_TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950", "gfx1100", "gfx1200")


@dataclass
class Compiled(report.Outcome):
    kernels: Sequence[Any] = ()

    def parts(self) -> Iterator[str]:
        if self.kernels:
            faults = sum(len(kernel.faults) for kernel in self.kernels)
            yield f"{len(self.kernels)} kernels, {faults} beyond their limits"


@dataclass(frozen=True)
class CudaCase:
    architecture: int
    seconds = 60.0

    @property
    def name(self) -> str:
        return f"sass-sm{self.architecture}"

    @property
    def gpu(self) -> Gpu:
        return BY_ARCHITECTURE[self.architecture]

    def run(self, timing: Timing = ONCE, progress: Progress = silent) -> CudaKernels:
        progress("compile")
        tools, files = sass.tools(), sass.sources()
        if not files:
            return CudaKernels(self, absent={self.name: f"no sources in {sass.SOURCES}"})
        if isinstance(tools, str):
            return CudaKernels(self, absent={self.name: tools})
        kernels = sass.read(tools, sass.compile_all(tools, files, [self.architecture]))
        found = sorted(map(limits.check, kernels), key=lambda finding: finding.kernel.name)
        return CudaKernels(self, kernels=found)


@dataclass
class CudaKernels(Compiled):
    case: CudaCase
    kernels: Sequence[Finding] = ()

    def data(self) -> dict[str, Any]:
        kernels = [
            {
                "kernel": finding.kernel.name,
                "registers": finding.kernel.registers,
                "shared": finding.kernel.shared,
                "warps": finding.warps,
                "per_weight": [finding.least, finding.per_weight],
                "limit": finding.rule and finding.rule.limit,
                "issue_slots": issue_share(finding, self.case.gpu),
                "faults": finding.faults,
            }
            for finding in self.kernels
        ]
        return {"group": "sass", "kernels": kernels}

    @classmethod
    def tables(cls, outcomes: Sequence[CudaKernels], unit: str) -> Iterator[tuple[str, str]]:
        """One kernel per row. Instructions per weight are along the shortest and the longest path once
        through the main loop; slots are the share of the issue slots that the shortest takes at full
        bandwidth."""
        titles = ("", "registers", "shared", "warps", "instr/weight", "at most", "slots", "")
        for found in outcomes:
            gpu = found.case.gpu
            if found.kernels:
                kernels = report.table(titles, (_cuda_row(finding, gpu) for finding in found.kernels))
                yield f"kernels as compiled for sm_{gpu.architecture}, beside {gpu.name}", kernels


def _cuda_row(finding: Finding, gpu: Gpu) -> list[str]:
    kernel, limit, slots = finding.kernel, finding.rule and finding.rule.limit, issue_share(finding, gpu)
    counts = [f"{value:.2f}" for value in (finding.least, finding.per_weight) if value is not None]
    return [
        kernel.name,
        str(kernel.registers),
        f"{kernel.shared:,}",
        str(finding.warps),
        "-".join(unique(counts)),
        "" if limit is None else f"{limit:g}",
        "" if slots is None else f"{slots:.0%}",
        "; ".join(finding.faults) or (MET if finding.rule else ""),
    ]


def issue_share(finding: Finding, gpu: Gpu) -> float | None:
    """Share of the issue slots at full bandwidth: a kernel above 1 cannot reach that bandwidth."""
    if finding.least is None or finding.rule is None:
        return None
    return gpu.issue_share(finding.least, finding.rule.read + finding.rule.written)


@dataclass(frozen=True)
class TritonCase:
    target: str
    seconds = 60.0

    @property
    def name(self) -> str:
        return f"triton-{self.target}"

    def run(self, timing: Timing = ONCE, progress: Progress = silent) -> TritonKernels:
        progress("compile")
        if importlib.util.find_spec("triton") is None:
            return TritonKernels(self, absent={self.name: "Triton is not installed"})
        triton_code = importlib.import_module(".triton_code", __package__)
        if reason := triton_code.unsupported(self.target):
            return TritonKernels(self, absent={self.name: reason})
        return TritonKernels(self, kernels=triton_code.compile_all([self.target]))


@dataclass
class TritonKernels(Compiled):
    case: TritonCase

    def data(self) -> dict[str, Any]:
        names = ("registers", "shared", "warps", "spills", "matrix", "faults")
        kernels = [
            {name: getattr(code.variant, name) for name in ("kernel", "config", "types")}
            | {name: getattr(code, name) for name in names}
            for code in self.kernels
        ]
        return {"group": "triton", "kernels": kernels}

    @classmethod
    def tables(cls, outcomes: Sequence[TritonKernels], unit: str) -> Iterator[tuple[str, str]]:
        """One kernel and config per row: the largest value over argument dtypes, and the fewest warps.

        Warps are those resident on a multiprocessor, spills are bytes of local memory per thread, matrix
        instructions are those for tensor cores.
        """
        titles = ("", "config", "variants", "registers", "shared", "warps", "spills", "matrix", "")
        for found in outcomes:
            alike: dict[tuple[str, str], list[Any]] = {}
            for code in found.kernels:
                alike.setdefault((code.variant.kernel, code.variant.config), []).append(code)
            rows = (_triton_row(*name, codes) for name, codes in sorted(alike.items(), key=lambda i: i[0]))
            if found.kernels:
                yield f"Triton kernels as compiled for {found.case.target}", report.table(titles, rows)


def _triton_row(kernel: str, config: str, codes: Sequence[Any]) -> list[str]:
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


def standard(dtype: str) -> list[CudaCase | TritonCase]:
    return [*map(CudaCase, sass.ARCHITECTURES), *map(TritonCase, TRITON_TARGETS)]
