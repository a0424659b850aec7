"""Host time of calls of the CUDA back end, on a stub device.

Launches are counted and do nothing, so times include neither the driver's launch (2 to 3 us each) nor the
caching allocator (CPU tensors come from malloc).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from stub_device import stub_device, torch_ops

import peft_kernels as pk
import testing

from ..lib import layers, report
from ..lib.cases import DTYPES
from ..lib.harness import Contender, interleave
from ..lib.report import OURS, Spread, Timing, missing, three_digits

SIZE = 2048
GOAL_US = 25.0
"""Of a patched PEFT layer, forward without grad, one row."""
GOAL_OF = "patched PEFT layer"


@dataclass(frozen=True)
class Case:
    """A layer of one shape and the ops below it."""

    dtype: str
    size: int = SIZE
    seconds = 5.0

    @property
    def name(self) -> str:
        return f"host-{self.size}x{self.size}-m1-{self.dtype}"

    def run(self, timing: Timing, progress: report.Progress = report.silent) -> HostCost:
        testing.register_ptx()
        reason = testing.unavailable("ptx") or missing("peft")
        if reason:
            return HostCost(self, absent={OURS: reason})
        progress("build")
        calls = self._calls()
        cost = HostCost(self)
        with stub_device() as launches:
            for name, call in calls.items():
                progress(f"count {name}")
                call()
                launches()
                call()
                cost.launches[name] = len(launches())
                cost.torch_ops[name] = sum(torch_ops(call).values())
            progress("time")
            contenders = [Contender(name, [call], lambda output: 0.0) for name, call in calls.items()]
            seconds = interleave(contenders, timing)
        cost.us = {name: Spread.of([value * 1e6 for value in values]) for name, values in seconds.items()}
        return cost

    def _calls(self) -> dict[str, Callable[[], Any]]:
        weights = layers.Weights(self.size, self.size, DTYPES[self.dtype])
        bases = layers.nf4_linears(weights, 1)
        (layer,) = layers.peft_loras(bases, weights, patch=True)
        x, dy = (tensor.view(1, 1, self.size) for tensor in (weights.x(1), weights.dy(1)))
        a, b = layers.adapters(layer)
        weight: Any = bases[0].weight
        op = partial(pk.lora_linear, weight=weight, lora_a=a, lora_b=b, scaling=layers.SCALING)
        return {
            "nf4_linear": layers.forward_call(partial(pk.nf4_linear, weight=weight), x),
            "lora_linear": layers.forward_call(op, x),
            GOAL_OF: layers.forward_call(layer, x),
            "forward + backward of it": layers.training_call(layer, x.clone().requires_grad_(), dy),
        }


@dataclass
class HostCost(report.Outcome):
    """Microseconds, launches and torch functions per call, by what is called."""

    case: Case
    us: dict[str, Spread] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    torch_ops: dict[str, int] = field(default_factory=dict)

    def parts(self) -> list[str]:
        return [f"{name} {three_digits(us.median)} us" for name, us in self.us.items()]

    def data(self) -> dict[str, Any]:
        us = {name: report.rounded(spread) for name, spread in self.us.items()}
        return {"group": "host", "us": us, "launches": self.launches, "torch_ops": self.torch_ops}

    def goals(self) -> Iterator[tuple[str, bool]]:
        if (us := self.us.get(GOAL_OF)) is not None:
            text = f"{GOAL_OF}: at most {GOAL_US:g} us, measured {three_digits(us.median)}"
            yield text, us.median <= GOAL_US

    @classmethod
    def tables(cls, outcomes: Sequence[HostCost], unit: str) -> Iterator[tuple[str, str]]:
        titles = ("", "us", "launches", "torch functions")
        for cost in outcomes:
            rows = (
                [name, report.cell(us), str(cost.launches[name]), str(cost.torch_ops[name])]
                for name, us in cost.us.items()
            )
            title = f"host code of back end cuda on a stub device, {cost.case.name}: per call"
            if cost.us:
                yield title, report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(dtype)]
