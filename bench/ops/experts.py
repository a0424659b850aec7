"""Linear layers of experts: ours on NF4, and torch's grouped_mm on dense 16-bit weights, as in transformers,
and on all experts dequantised in each call.

M counts tokens; each goes to `top` random experts, so M * top rows are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
import testing

from ..lib import correctness, layers
from ..lib.cases import DTYPES
from ..lib.harness import Case, Contenders, compared
from ..lib.layers import RANK, SCALING
from ..lib.report import OURS

FORWARD, TRAIN, QLORA = "experts-forward", "experts-train", "experts-qlora"
TITLES = {
    FORWARD: "experts in NF4, forward without grad",
    TRAIN: "experts in NF4, forward + backward to x",
    QLORA: f"an adapter of r={RANK} for each expert in NF4, forward + backward",
}
DENSE, DEQUANTISED = "dense, grouped_mm", "dequantise, grouped_mm"


@dataclass(frozen=True)
class Shape:
    experts: int
    top: int
    out_features: int
    in_features: int


GATE_UP, DOWN = Shape(128, 8, 1536, 2048), Shape(128, 8, 2048, 768)  # of Qwen3-MoE
MIXTRAL = Shape(8, 2, 7168, 1024)  # gate_up, at a quarter of its width
TOKENS = {FORWARD: (1, 16, 128, 1024), TRAIN: (128, 1024), QLORA: (128, 1024)}


@dataclass
class Experts:
    shape: Shape
    dtype: torch.dtype
    device: str = "cpu"

    @cached_property
    def nf4(self) -> pk.NF4Weight:
        n, k = self.shape.out_features, self.shape.in_features
        dense = torch.empty(self.shape.experts, n, k, dtype=self.dtype)
        for e, one in enumerate(dense):
            one.copy_(testing.tensor(n, k, dtype=self.dtype, seed=e, scale=k**-0.5))
        return pk.NF4Weight.quantize(dense.to(self.device))

    @cached_property
    def rounded(self) -> Tensor:
        return self.nf4.dequantize(self.dtype)

    @cached_property
    def adapters(self) -> tuple[Tensor, Tensor]:
        e, n, k = self.shape.experts, self.shape.out_features, self.shape.in_features
        a = testing.tensor(e, RANK, k, seed=2, scale=k**-0.5).to(self.device)
        b = testing.tensor(e, n, RANK, seed=3, scale=RANK**-0.5).to(self.device)
        return a.requires_grad_(), b.requires_grad_()

    def ends(self, tokens: int) -> Tensor:
        """Row offsets of the experts; each token draws its experts without replacement."""
        draws = torch.rand(tokens, self.shape.experts, generator=torch.Generator().manual_seed(7))
        chosen = draws.topk(self.shape.top).indices.flatten()
        counts = torch.bincount(chosen, minlength=self.shape.experts)
        return counts.cumsum(0).to(self.device, torch.int32)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def expected(
    group: str, weights: Experts, x: Tensor, dy: Tensor, ends: Tensor, adapters: tuple[Tensor, Tensor]
) -> correctness.Expected:
    def results(widen: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
        rows, gradient, (a, b) = widen(x), widen(dy), (widen(t.detach()) for t in adapters)
        base, n, k = weights.nf4._state.op_args, weights.shape.out_features, weights.shape.in_features
        if group != QLORA:
            y = testing.reference_op("experts_linear")(rows, ends, *base, n, None)
            if group == FORWARD:
                return {"y": y}
            return {"y": y, "dx": testing.reference_op("experts_linear_dx")(gradient, ends, *base, k)}
        y, h = testing.reference_op("experts_lora_linear")(rows, ends, *base, None, a, b, SCALING)
        backward = testing.reference_op("experts_lora_linear_backward")
        found = backward(gradient, rows, h, ends, *base, a, b, SCALING, True, True, True)
        return {"y": y, **dict(zip(("dx", "da", "db"), found, strict=True))}

    return correctness.Expected(results(lambda t: t), results(testing.widen))


def experts(group: str, shape: Shape, tokens: int, dtype: str, device: str = "cpu") -> Case:
    def build() -> Contenders:
        weights = layers.shared(Experts, "experts", shape, DTYPES[dtype], device)
        ends, rows = weights.ends(tokens), tokens * shape.top
        x = testing.tensor(rows, shape.in_features, dtype=weights.dtype, seed=4).to(device)
        dy = testing.tensor(rows, shape.out_features, dtype=weights.dtype, seed=5).to(device)
        a, b = adapters = weights.adapters
        wanted = expected(group, weights, x, dy, ends, adapters)
        leaf = x.clone().requires_grad_()

        def ours(rows: Tensor) -> Tensor:
            if group == QLORA:
                return pk.experts_lora_linear(rows, ends, weights.nf4, a, b, SCALING)
            return pk.experts_linear(rows, ends, weights.nf4)

        def peer(weight: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
            def forward(rows: Tensor) -> Tensor:
                y = grouped(rows, weight(), ends)
                if group != QLORA:
                    return y
                return y + SCALING * grouped(grouped(rows, a.to(x.dtype), ends), b.to(x.dtype), ends)

            return forward

        def call(forward: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
            if group == FORWARD:
                return layers.forward_call(forward, x)
            inputs = {"dx": leaf} if group == TRAIN else {"dx": leaf, "da": a, "db": b}
            return layers.differentiated(lambda: forward(leaf), inputs, dy)

        dense, dequantised = peer(lambda: weights.rounded), peer(lambda: weights.nf4.dequantize(x.dtype))
        forwards = {OURS: ours, DENSE: dense, DEQUANTISED: dequantised}
        return compared(wanted, {name: partial(call, forward) for name, forward in forwards.items()})

    name = f"{group}-{shape.experts}"
    return Case(
        name, shape.out_features, shape.in_features, tokens, dtype, build, title=TITLES[group], seconds=10.0
    )


def standard(dtype: str) -> list[Case]:
    """Consecutive cases share their weights."""
    shapes = GATE_UP, DOWN, MIXTRAL
    return [experts(group, s, m, dtype) for s in shapes for group, tokens in TOKENS.items() for m in tokens]
