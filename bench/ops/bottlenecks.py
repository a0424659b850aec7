"""Bottleneck adapters compared with plain torch modules.

A sequential adapter adds to its own input, a parallel one to the output of a sublayer. `mixed`: fp32
parameters with bf16 activations, which plain modules widen. `autocast`: the same under autocast, where plain
modules and ours round the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import testing
from peft_kernels.adapters import AdapterConfig
from peft_kernels.adapters.adapter import BottleneckAdapter

from ..lib import correctness, layers
from ..lib.cases import DTYPES
from ..lib.harness import Case, Contenders, compared
from ..lib.report import OURS

WIDTH, BOTTLENECK, SCALING = 768, 48, 2.0
ROWS = (1, 16, 128, 2048)
MODULES = "modules"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class Kind:
    train: bool
    parallel: bool = False
    mixed: bool = False
    autocast: bool = False
    activation: str = "relu"

    @property
    def group(self) -> str:
        parts = ["bottleneck"] + ["parallel"] * self.parallel + ["mixed"] * self.mixed
        parts += ["autocast"] * self.autocast
        parts += [self.activation] * (self.activation != "relu")
        return "-".join([*parts, "train" if self.train else "forward"])

    @property
    def title(self) -> str:
        what = f"{'parallel' if self.parallel else 'sequential'} adapter, {self.activation}"
        beside = ", fp32 parameters with bf16" if self.mixed or self.autocast else ""
        beside += ", autocast" if self.autocast else ""
        passes = "forward + backward" if self.train else "forward without grad"
        return f"{what}, r={BOTTLENECK}{beside}, {passes}"


class Plain(nn.Module):
    def __init__(self, kind: Kind, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        r, width = inputs["down"].shape
        dtype = inputs["down"].dtype
        self.down, self.up = nn.Linear(width, r, dtype=dtype), nn.Linear(r, width, dtype=dtype)
        for name, layer in (("down", self.down), ("up", self.up)):
            layer.weight = nn.Parameter(inputs[name])
            layer.bias = nn.Parameter(inputs[name + "_bias"])
        self.activation, self.parallel = ACTIVATIONS[kind.activation], kind.parallel

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        return (beside if self.parallel else x) + SCALING * self.up(self.activation(self.down(x)))

    def leaves(self) -> dict[str, nn.Parameter]:
        return {
            "down": self.down.weight,
            "up": self.up.weight,
            "down_bias": self.down.bias,
            "up_bias": self.up.bias,
        }


def adapter_of(kind: Kind, parameters: Mapping[str, nn.Parameter]) -> BottleneckAdapter:
    r, width = parameters["down"].shape
    config = AdapterConfig(
        False, True, parallel=kind.parallel, reduction=width / r, activation=kind.activation, scaling=SCALING
    )
    adapter = BottleneckAdapter(config, width, torch.device("cpu"), parameters["down"].dtype)
    for name, parameter in parameters.items():
        setattr(adapter, name, parameter)
    return adapter


def inputs_of(kind: Kind, width: int, r: int, m: int, dtype: torch.dtype) -> dict[str, Tensor]:
    kept = torch.float32 if kind.mixed or kind.autocast else dtype
    return {
        "x": testing.tensor(m, width, dtype=dtype, seed=4),
        "residual": testing.tensor(m, width, dtype=dtype, seed=6),
        "down": testing.tensor(r, width, dtype=kept, seed=2, scale=width**-0.5),
        "up": testing.tensor(width, r, dtype=kept, seed=3, scale=r**-0.5),
        "down_bias": testing.tensor(r, dtype=kept, seed=7),
        "up_bias": testing.tensor(width, dtype=kept, seed=8),
    }


def expected(kind: Kind, inputs: Mapping[str, Tensor], dy: Tensor) -> correctness.Expected:
    """Results in fp32, rounded, and in fp64."""

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        wide = {name: value.to(dtype, copy=True) for name, value in inputs.items()}
        plain, x, residual = Plain(kind, wide), *(wide[name].requires_grad_() for name in ("x", "residual"))
        return called(kind, lambda: plain(x, residual), x, residual, plain.leaves(), dy.to(dtype))()

    rounded = {
        name: value.to(inputs["x" if name == "y" else name].dtype)
        for name, value in results(torch.float32).items()
    }
    return correctness.Expected(rounded, results(torch.float64))


def called(
    kind: Kind,
    forward: Callable[[], Tensor],
    x: Tensor,
    residual: Tensor,
    parameters: Mapping[str, Tensor],
    dy: Tensor,
) -> Callable[[], dict[str, Tensor]]:
    """A forward without grad, or forward and backward to all inputs."""
    if not kind.train:
        return layers.forward_call(lambda _: forward(), x)
    beside = {"residual": residual} if kind.parallel else {}
    return layers.differentiated(forward, {"x": x, **beside, **parameters}, dy)


def bottleneck(kind: Kind, m: int, dtype: str, width: int = WIDTH, r: int = BOTTLENECK) -> Case:
    def build() -> Contenders:
        inputs = inputs_of(kind, width, r, m, DTYPES[dtype])
        dy = testing.tensor(m, width, dtype=DTYPES[dtype], seed=5)
        plain = Plain(kind, inputs)
        parameters = plain.leaves()
        adapter = adapter_of(kind, parameters)
        x, residual = (inputs[name].clone().requires_grad_(kind.train) for name in ("x", "residual"))

        def ours() -> Tensor:
            return adapter(x, residual if kind.parallel else None)

        def modules() -> Tensor:
            return plain(x.float(), residual.float()) if kind.mixed else plain(x, residual)

        def call(forward: Callable[[], Tensor]) -> Callable[[], Any]:
            def cast() -> Tensor:
                with torch.autocast("cpu", x.dtype, enabled=kind.autocast):
                    return forward().to(x.dtype)

            return called(kind, cast, x, residual, parameters, dy)

        wanted = expected(kind, inputs, dy)
        if kind.autocast:
            wanted = correctness.Expected(call(modules)(), wanted.truth)
        return compared(wanted, {OURS: partial(call, ours), MODULES: partial(call, modules)})

    return Case(kind.group, width, width, m, dtype, build, title=kind.title, seconds=20.0)


def standard(dtype: str) -> list[Case]:
    found = []
    for kept, mixed in (("bf16", False), ("bf16", True), ("fp32", False)):
        for parallel in (False, True):
            for train in (False, True):
                found += [bottleneck(Kind(train, parallel, mixed), m, kept) for m in ROWS]
        for activation in ("gelu", "silu"):
            found.append(bottleneck(Kind(True, mixed=mixed, activation=activation), max(ROWS), kept))
    kinds = [Kind(True, parallel, autocast=True) for parallel in (False, True)]
    return [*found, *(bottleneck(kind, m, "bf16") for kind in kinds for m in ROWS)]
