"""Shared by the tests of bench: a fake clock and small cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.lib import adapted, cases, report
from bench.lib.harness import Absent, Case, Contender, Result
from bench.lib.report import Timing
from bench.models import model

TINY = (64, 128)
TINY_BLOCK = adapted.Sizes(hidden=256, intermediate=512, heads=4, kv_heads=2)
FACTS = {"cpu": "a machine", "versions": {"torch": torch.__version__}}


class Machine:
    """A clock that advances only by calls, and a record of them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, label: str, *seconds: float) -> Callable[[], str]:
        """A call that takes each of the durations in turn, and the last one from then on."""
        left = list(seconds)

        def run() -> str:
            self.calls.append(label)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return label

        return run

    def contender(self, name: str, *seconds: float, copies: int = 1) -> Contender:
        return Contender(name, [self.call(f"{name}{i}", *seconds) for i in range(copies)], lambda result: 0.0)


def case_of(*contenders: Contender | Absent) -> Case:
    return Case(cases.FORWARD, *TINY, 4, "bf16", lambda: contenders)


def measure(case: Case, machine: Machine | None = None, rounds: int = 2) -> Result:
    machine = machine or Machine()
    return case.run(Timing(0.0, rounds), clock=machine.clock)


def line_of(outcome: report.Outcome) -> Any:
    return json.loads(json.dumps(report.json_data(outcome, FACTS)))


def skip_without(*libraries: str) -> None:
    for library in libraries:
        pytest.importorskip(library, reason=f"{library} is not installed")


def model_case(group: str, dtype: str = "bf16") -> Case:
    skip_without("peft", "transformers")
    sizes = model.ModelSizes(TINY_BLOCK, layers=2, vocabulary=500)
    if group == model.DECODE:
        return model.decode(2, 8, 4, dtype, sizes)
    return (model.step if group == model.STEP else model.textbook)(2, 16, dtype, sizes)


def block_case(group: str, dtype: str = "bf16") -> Case:
    skip_without("peft", "transformers")
    batch = max(2, cases.BLOCKS[group].adapters)
    # Not smaller: errors of gradients over few roundings say little.
    return cases.block(group, batch, 16, dtype, TINY_BLOCK)
