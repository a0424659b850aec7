"""A step of AdamW with 8-bit moments, and of bitsandbytes' and torch's fused AdamW; fp32 parameters.

The remark has the bytes of state per parameter, and the bytes that a step reads and writes at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import peft_kernels as pk
import testing

from ..lib.harness import Case, Contenders, Entry, contenders
from ..lib.layers import BNB
from ..lib.report import OURS

ONE, MANY, WHOLE = "adamw-one-tensor", "adamw-448-tensors", "adamw-135m"
HUNDRED = "adamw-100m"  # on a GPU only
TITLES = {
    ONE: "a step of AdamW, 5 million parameters in one tensor",
    MANY: "a step of AdamW, 5 million parameters in 448 tensors of LoRA's size",
    WHOLE: "a step of AdamW, the 135 million parameters of SmolLM2-135M",
    HUNDRED: "a step of AdamW, 100 million parameters in one tensor",
}
BNB_8BIT, BNB_32BIT, TORCH = "bnb AdamW8bit", "bnb AdamW32bit", "torch fused AdamW"
ONE_TENSOR = "ours, one tensor"
LR, DECAY = 1e-3, 1e-2
STEP_BYTES = 4 + 2 * (4 + 2 * (1 + 4 / 256))
"""Read and written per fp32 parameter by a step with 8-bit moments: gradient, parameter, moments."""

Shapes = Sequence[tuple[int, int]]
LORA: Shapes = [(16, 700)] * 448
FIVE_MILLION: Shapes = [(7168, 700)]
HUNDRED_MILLION: Shapes = [(100_000, 1000)]
LAYER: Shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SMOLLM2: Shapes = [(49152, 576), *(LAYER * 30)]


def standard(dtype: str) -> list[Case]:
    return [
        case(ONE, FIVE_MILLION),
        case(MANY, LORA, FIVE_MILLION),
        case(WHOLE, SMOLLM2),
    ]


def case(
    group: str,
    shapes: Shapes,
    yardstick: Shapes | None = None,
    build: Callable[[Shapes], Contenders] | None = None,
) -> Case:
    rows = sum(a * b for a, b in shapes) // shapes[-1][1]
    make = partial(build or partial(_build, yardstick=yardstick), shapes)
    cheaper = [ONE_TENSOR] if yardstick else []
    title = TITLES[group]
    return Case(group, rows, shapes[-1][1], None, "fp32", make, yardsticks=cheaper, title=title, seconds=5.0)


def _build(shapes: Shapes, yardstick: Shapes | None) -> Contenders:
    found = entries(shapes)
    if yardstick is not None:
        found.append(replace(entries(yardstick)[0], name=ONE_TENSOR))
    return contenders(found)


def entries(shapes: Shapes, device: str = "cpu", copies: int = 1) -> list[Entry]:
    grads = [testing.tensor(*shape, seed=1).to(device) for shape in shapes]
    on_card: dict[str, Any] = {"capturable": True} if device == "cuda" else {}

    def ours(params: list[Tensor]) -> Any:
        return pk.optim.AdamW8bit(params, lr=LR, weight_decay=DECAY)

    def bnb(name: str, params: list[Tensor]) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(params, lr=LR, weight_decay=DECAY)

    def fused(params: list[Tensor]) -> Any:
        return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True, **on_card)

    def entry(name: str, make: Callable[[list[Tensor]], Any], needs: str = "") -> Entry:
        def stepped() -> list[Stepped]:
            return [Stepped(make, grads) for _ in range(copies)]

        return Entry(name, stepped, Stepped.error, needs, remark=Stepped.remark)

    return [
        entry(OURS, ours),
        entry(BNB_8BIT, partial(bnb, "AdamW8bit"), BNB),
        entry(BNB_32BIT, partial(bnb, "AdamW32bit"), BNB),
        entry(TORCH, fused),
    ]


class Stepped:
    """An optimizer with its own parameters, and gradients that contenders share."""

    def __init__(self, make: Callable[[list[Tensor]], Any], grads: Sequence[Tensor]) -> None:
        self.params = [torch.nn.Parameter(testing.tensor(*g.shape).to(g.device)) for g in grads]
        self.start = self.params[-1].detach().double()
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.optimizer = make(list(self.params))

    def __call__(self) -> Stepped:
        self.optimizer.step()
        return self

    def error(self) -> float:
        """Of the first step, which moves every element by lr against its gradient, and decays it."""
        p = self.params[-1]
        assert p.grad is not None
        moved = -LR * DECAY * self.start - LR * p.grad.double().sign()
        error = testing.relative_error(p.detach().double() - self.start, moved)
        if not error < 1e-3:
            raise AssertionError(f"the first step is off by {error:.3g}, allowed 1e-3")
        return error

    def remark(self) -> str:
        if not self.optimizer.state:
            return ""
        count = sum(p.numel() for p in self.params)
        kept = [state for p in self.params if (state := self.optimizer.state[p])]
        values = chain.from_iterable(state.items() for state in kept)
        nbytes = sum(v.nbytes for k, v in values if isinstance(v, Tensor) and k != "step" and "qmap" not in k)
        moved = 2 * nbytes + sum(2 * p.nbytes + p.nbytes for p in self.params)
        return f"{nbytes / count:.2f} bytes of state a parameter, {moved / 1e9:.3g} GB a step"
