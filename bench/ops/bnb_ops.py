"""bitsandbytes' Linear4bit as it is and on our kernels, interleaved.

Its ops are switched for the whole process at the start of a turn, outside the timed calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft_kernels.integrations import bitsandbytes

from ..lib import cases, correctness, harness, layers
from ..lib.cases import DTYPES, LARGE, Shape
from ..lib.harness import Case, Clock, Contender, Contenders, Entry, Turn, contenders
from ..lib.layers import BNB, Weights
from ..lib.report import OURS

EVAL, TRAIN = "bitsandbytes-ops-eval", "bitsandbytes-ops-train"
TITLES = {
    EVAL: "bitsandbytes' Linear4bit in evaluation, with and without enable(), forward without grad",
    TRAIN: "bitsandbytes' Linear4bit in training, with and without enable(), forward + backward to x",
}
STOCK = "bnb as it is"


class Switched:
    """A call with bitsandbytes' ops on our kernels, or unchanged."""

    on = False

    def __init__(self, call: Callable[[], Any], on: bool) -> None:
        self._call, self._on = call, on

    def switch(self) -> None:
        if Switched.on != self._on:
            (bitsandbytes.enable if self._on else bitsandbytes.disable)()
            Switched.on = self._on

    def __call__(self) -> Any:
        self.switch()
        return self._call()


@dataclass(frozen=True)
class SwitchedCase(Case):
    def run(self, *arguments: Any, **options: Any) -> harness.Result:
        try:
            clock = options.pop("clock", time.perf_counter)
            return super().run(*arguments, **options, clock=clock, take_turns=partial(switched_turns, clock))
        finally:
            bitsandbytes.disable()
            Switched.on = False


def switched_turns(clock: Clock, runners: Sequence[Contender]) -> dict[str, Turn]:
    def turn(call: Any, timed: Turn) -> float:
        call.switch()
        return timed()

    return {c.name: partial(turn, c.calls[0], harness.clocked_turn(c, clock)) for c in runners}


def standard(dtype: str) -> list[Case]:
    found = [linear4bit(EVAL, LARGE, m, dtype) for m in (1, 16, 128)]
    return [*found, *(linear4bit(TRAIN, LARGE, m, dtype) for m in (16, 128))]


def linear4bit(group: str, shape: Shape, m: int, dtype: str) -> Case:
    training = group == TRAIN

    def build() -> Contenders:
        weights = Weights(*shape, DTYPES[dtype])
        x, dy = weights.x(m), weights.dy(m)
        exact = weights.exact
        expected = correctness.linear_with_dx(x, dy, exact) if training else correctness.linear(x, exact)
        count, _ = cases.weight_copies(weights, 2)

        def call(layer: Any) -> Callable[[], Any]:
            if training:
                return layers.training_call(layer, x.clone().requires_grad_(), dy)
            return layers.forward_call(layer, x)

        def entry(name: str, on: bool, verify: Callable[[Any], float]) -> Entry:
            make = Switched(partial(layers.bnb_linears, weights, count, "train" if training else "eval"), on)
            return Entry(name, make, verify, BNB, lambda layer: Switched(call(layer), on))

        entries = entry(OURS, True, expected.strict), entry(STOCK, False, expected.sane)
        return contenders(entries, cache=weights)

    return SwitchedCase(group, *shape, m, dtype, build, title=TITLES[group], seconds=3.0)
