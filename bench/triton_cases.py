"""The Triton kernels as compiled, without a GPU: see triton_code.py. One case is one target."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TARGETS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Case:
    target: str

    @property
    def name(self) -> str:
        return f"triton-{self.target}"


@dataclass
class Compiled:
    """What came of a case: code, or in `absent` why there is none."""

    case: Case
    codes: Sequence[Any] = ()
    absent: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)


def standard() -> list[Case]:
    return [Case(target) for target in TARGETS]


def measure(case: Case) -> Compiled:
    if importlib.util.find_spec("triton") is None:
        return Compiled(case, absent={case.name: "Triton is not installed"})
    triton_code = importlib.import_module(".triton_code", __package__)
    if reason := triton_code.unsupported(case.target):
        return Compiled(case, absent={case.name: reason})
    return Compiled(case, triton_code.compile_all([case.target]))
