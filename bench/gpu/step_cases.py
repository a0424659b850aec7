"""The cases of run.py that are parts of a training step: norms, rotary embedding, the loss of a head, and a
whole decoder layer with LoRA on NF4 weights.

Peers are what transformers' models compute, in plain torch; the head's also Liger's kernel. Truth is fp64
where memory bounds a part, and fp32, far more exact than bf16, where GEMMs do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk

from ..lib import correctness, layers
from ..lib.harness import Build, Case, Contenders, Entry, compared, contenders, copies
from ..lib.layers import BNB
from ..lib.report import OURS
from ..ops import losses
from . import step_estimate
from .decoder_layer import EPS, LLAMA, Layer, Sizes, add_norm, angles, norm, rotary
from .step_estimate import Cost, Ours

TINY = Sizes(2, 20, 192, 320, 6, 2, 32, 300, 1)
DTYPE = "bf16"
TORCH, ONE_OP, COMPILED = "torch", "F.rms_norm", "torch, compiled"
ON_BNB, ON_DENSE = "torch on bnb", "torch on dense"

Function = Callable[..., Any]
LIMITS: dict[str, Callable[[Ours], Cost]] = {
    "step-layer": lambda model: sum(step_estimate.layer(model), Cost()),
    "step-loss": lambda model: sum(model.loss(), Cost()),
    "step-loss-nf4": lambda model: sum(model.loss(packed=True), Cost()),
    "step-norm": lambda model: model.norm()[0],
    "step-norm-train": lambda model: sum(model.norm(), Cost()),
    "step-norm-train-weight": lambda model: sum(model.trained_norm(), Cost()),
    "step-add-norm": lambda model: model.add_norm()[0],
    "step-add-norm-train": lambda model: sum(model.add_norm(), Cost()),
    "step-rotary": lambda model: model.rotary()[0],
    "step-rotary-train": lambda model: sum(model.rotary(), Cost()),
}
"""What a card needs at least for each case, of the sizes of LLAMA."""


def call(function: Function, inputs: Mapping[str, Tensor], dy: Sequence[Tensor]) -> Callable[[], Any]:
    """A forward without grad, or, given gradients of its results, forward and backward."""
    needing = {f"d{name}": t for name, t in inputs.items() if t.requires_grad}

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(bool(dy)):
            y = function(*inputs.values())
        y = y if isinstance(y, tuple) else (y,)
        found = {f"y{i}": t.detach() for i, t in enumerate(y)}
        if dy:
            found |= zip(needing, torch.autograd.grad(y, list(needing.values()), dy), strict=True)
        return found

    return run


def one_op(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def add_one_op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return one_op(total, weight), total


NORMS: dict[bool, dict[str, Function]] = {
    False: {OURS: partial(pk.rms_norm, eps=EPS), TORCH: norm, ONE_OP: one_op},
    True: {OURS: partial(pk.add_rms_norm, eps=EPS), TORCH: add_norm, ONE_OP: add_one_op},
}
"""Alone, and of a residual sum."""


class Parts:
    """The cases for one device. `tiny`: small shapes for checking, without contenders that are compiled."""

    def __init__(self, device: str, tiny: bool, cache: int, release: Callable[[], None]) -> None:
        self.device, self.tiny, self.cache, self.release = device, tiny, cache, release
        self.sizes = TINY if tiny else LLAMA

    def cases(self) -> list[Case]:
        """The most important first: time may run out."""
        hidden, both = self.sizes.hidden, "forward + backward"
        heads = self.sizes.heads * self.sizes.features, self.sizes.key_heads * self.sizes.features
        norms = hidden, hidden
        norm, add = partial(self.norm, False), partial(self.norm, True)
        alone, summed, turned = "RMS norm", "residual sum and its RMS norm", "rotary embedding"
        apart = "forward without grad"
        return [
            self.case(
                "layer", (self.sizes.intermediate, hidden), self.layer, f"a decoder layer, {both}", 15.0
            ),
            self.loss("frozen"),
            self.case("norm", norms, norm, f"{alone}, {apart}"),
            self.case("add-norm", norms, add, f"{summed}, {apart}"),
            self.case("add-norm-train", norms, partial(add, "x", "residual"), f"{summed}, frozen, {both}"),
            self.case("rotary", heads, self.rotary, f"{turned}, {apart}"),
            self.case("rotary-train", heads, partial(self.rotary, "q", "k"), f"{turned}, {both}"),
            self.case("norm-train", norms, partial(norm, "x"), f"{alone}, frozen, {both}"),
            self.case("norm-train-weight", norms, partial(norm, "x", "weight"), f"{alone}, trained, {both}"),
            self.loss("nf4"),
        ]

    def case(self, part: str, shape: tuple[int, int], build: Build, title: str, seconds: float = 2.0) -> Case:
        rows, batch = self.sizes.tokens, self.sizes.sequences
        case = Case(f"step-{part}", *shape, rows, DTYPE, build, batch, title=title, seconds=seconds)
        return self.released(case)

    def loss(self, head: str) -> Case:
        case = losses.case(
            head, self.sizes.tokens, DTYPE, (self.sizes.vocabulary, self.sizes.hidden), card=self.device
        )
        group = "step-loss" if head == "frozen" else f"step-loss-{head}"
        return self.released(replace(case, group=group, seconds=10.0))

    def released(self, case: Case) -> Case:
        """The case, for which memory is freed first."""

        def build() -> Contenders:
            self.release()
            return case.build()

        return replace(case, build=build, seconds=1.0 if self.tiny else case.seconds)

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return layers.normal(*shape, dtype=torch.bfloat16, seed=seed, scale=scale, device=self.device)

    def memory_bound(
        self,
        functions: Mapping[str, Function],
        given: Mapping[str, Tensor],
        trained: Sequence[str],
        dy: Sequence[Tensor],
    ) -> Contenders:
        """Contenders on copies of their inputs. The function of TORCH defines the result."""
        count = (
            2 if self.tiny else copies(sum(t.nbytes for t in given.values()), len(functions) + 1, self.cache)
        )
        if not self.tiny:
            functions = {**functions, COMPILED: torch.compile(functions[TORCH], dynamic=False)}

        def leaves(wide: bool = False) -> dict[str, Tensor]:
            made = {name: t.double() if wide else t.clone() for name, t in given.items()}
            return {name: t.requires_grad_(name in trained) for name, t in made.items()}

        truth = call(functions[TORCH], leaves(wide=True), [t.double() for t in dy])()
        wanted = correctness.Expected(call(functions[TORCH], leaves(), dy)(), truth)

        def entry(name: str, function: Function) -> Entry:
            verify = wanted.strict if name == OURS else wanted.sane
            return Entry(name, lambda: [call(function, leaves(), dy) for _ in range(count)], verify)

        return contenders([entry(name, function) for name, function in functions.items()])

    def norm(self, adds: bool, *trained: str) -> Contenders:
        """An RMS norm, of a residual sum if it `adds`."""
        names, shape = ("x", "residual") if adds else ("x",), self.sizes.states
        given = {name: self.normal(*shape, seed=seed) for seed, name in enumerate(names)}
        given["weight"] = 1 + self.normal(shape[-1], seed=4, scale=0.1)
        dy = [
            self.normal(*shape, seed=seed) for seed, _ in enumerate(names, 2)
        ]  # of the norm, and of the sum
        return self.memory_bound(NORMS[adds], given, trained, dy if trained else [])

    def rotary(self, *trained: str) -> Contenders:
        shapes = self.sizes.queries, self.sizes.keys
        q, k = (self.normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
        given = dict(zip(("q", "k", "cos", "sin"), (q, k, *angles(self.sizes, self.device)), strict=True))
        dy = [self.normal(*shape, seed=seed) for seed, shape in enumerate(shapes, 2)]
        return self.memory_bound({OURS: pk.rotary, TORCH: rotary}, given, trained, dy if trained else [])

    def layer(self) -> Contenders:
        layer = Layer(self.sizes, self.device)
        x, dy = (self.normal(*self.sizes.states, seed=seed) for seed in (1, 2))
        tables = angles(self.sizes, self.device)

        def made(forward: Function, dtype: torch.dtype = x.dtype) -> Callable[[], Any]:
            inputs = {"x": x.to(dtype), **layer.adapters(dtype)}
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            return call(partial(forward, *(t.to(dtype) for t in tables)), leaves, [dy.to(dtype)])

        def dense(dtype: torch.dtype) -> Callable[[], Any]:
            bases = [partial(F.linear, weight=weights.exact.to(dtype)) for weights in layer.weights]
            return made(partial(layer.stock, bases), dtype)

        def on_bnb() -> Callable[[], Any]:
            bases = [layers.bnb_linears(weights, 1, "train")[0] for weights in layer.weights]
            return made(partial(layer.stock, bases))

        on_dense = partial(dense, x.dtype)
        wanted = correctness.Expected(on_dense()(), dense(torch.float32)())
        return [
            *compared(wanted, {OURS: partial(made, layer.ours)}),
            *compared(wanted, {ON_BNB: on_bnb}, BNB),
            *compared(wanted, {ON_DENSE: on_dense}),
        ]
