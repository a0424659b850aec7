"""The CUDA kernels as compiled, without a GPU: see sass.py. One case is one architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import limits, sass
from .floors import BY_ARCHITECTURE, Gpu
from .limits import Finding


@dataclass(frozen=True)
class Case:
    architecture: int

    @property
    def name(self) -> str:
        return f"sass-sm{self.architecture}"

    @property
    def gpu(self) -> Gpu:
        """The card that the counts are put beside."""
        return BY_ARCHITECTURE[self.architecture]


@dataclass
class Compiled:
    """What came of a case: findings, or in `absent` why there are none."""

    case: Case
    findings: Sequence[Finding] = ()
    absent: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        return [f"{finding.kernel.name}: {fault}" for finding in self.findings for fault in finding.faults]


def standard() -> list[Case]:
    return [Case(architecture) for architecture in sass.ARCHITECTURES]


def measure(case: Case) -> Compiled:
    tools, files = sass.tools(), sass.sources()
    if not files:
        return Compiled(case, absent={case.name: f"no sources in {sass.SOURCES}"})
    if isinstance(tools, str):
        return Compiled(case, absent={case.name: tools})
    kernels = sass.read(tools, sass.compile_all(tools, files, [case.architecture]))
    return Compiled(case, sorted(map(limits.judge, kernels), key=lambda finding: finding.kernel.name))


def slots(finding: Finding, gpu: Gpu) -> float | None:
    """The part of the issue slots that a kernel takes while it keeps the memory busy: above 1 it cannot."""
    if finding.least is None or finding.rule is None:
        return None
    return gpu.slots(finding.least, finding.rule.read + finding.rule.written)


def matrix_peak(finding: Finding, gpu: Gpu) -> float | None:
    """The part of the matrix peak that the issue slots leave."""
    return finding.per_matrix and min(1.0, gpu.matrix_cycles / finding.per_matrix)
