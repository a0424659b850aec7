"""The cases of LinearWgmma, compared with our kernels for mma.sync and others, on compute capability 9.0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from peft_kernels.core import dispatch
from peft_kernels.core.backends import BACKENDS
from peft_kernels.core.backends.crossovers import Rows
from peft_kernels.core.backends.wgmma_check import BLOCKSIZE, MMA_SYNC, WGMMA

from ..lib.harness import Case, Entry
from ..lib.layers import Weights
from ..lib.report import OURS
from . import device_cases
from .device_cases import CUBLAS, UNFUSED, Call, Suite

ROWS = (64, 128, 256, 512, 1024, 2048, 4096)
TINY_ROWS = (64, 130)
BY_MMA_SYNC = "ours by mma.sync"


def has_wgmma(backend: str) -> bool:
    """Whether a back end can run LinearWgmma here."""
    found: Any = BACKENDS[backend]
    if not hasattr(found, "with_kernels"):
        return False
    with found.with_kernels(WGMMA):
        return "wgmma" in found.extension.plan(64, 64, 64, BLOCKSIZE, "bfloat16")[0]


def cases(suite: Suite) -> list[Case]:
    shapes, rows = (device_cases.TINY_SHAPES, TINY_ROWS) if suite.tiny else (device_cases.SHAPES, ROWS)
    groups = (device_cases.WGMMA, suite.forward), (device_cases.WGMMA_DX, suite.dx)
    return [
        suite.case(group, shape, m, partial(compared, entries))
        for shape in shapes for group, entries in groups for m in rows
    ]  # fmt: skip


def compared(entries: Any, weights: Weights, m: int) -> list[Entry]:
    """Contenders of a GEMM: ours in two ways, and those of others."""
    found = {entry.name: entry for entry in entries(weights, m)}
    ours = found[OURS]
    return [
        replace(ours, make=partial(_made, ours, WGMMA), remark=partial(_remark, ours)),
        replace(ours, name=BY_MMA_SYNC, make=partial(_made, ours, MMA_SYNC), remark=lambda layer: ""),
        *(found[name] for name in (CUBLAS, UNFUSED, "bnb")),
    ]


def _backend() -> Any:
    return BACKENDS[dispatch.forced() or "cuda"]


def _remark(entry: Entry, layer: Any) -> str:
    with _backend().with_kernels(WGMMA):
        return entry.remark(layer)


def _made(entry: Entry, row: Rows) -> Sequence[Call]:
    backend = _backend()

    def with_kernels(call: Call) -> Call:
        def run(x: Tensor) -> Tensor:
            with backend.with_kernels(row):
                return call(x)

        return run

    return [with_kernels(call) for call in entry.make()]
