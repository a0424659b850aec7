"""The cases of run.py, with weights, inputs and expected results on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels.core import dispatch
from peft_kernels.core.backends import BACKENDS
from peft_kernels.core.backends.self_test.gemms import BLOCKSIZE, MMA_SYNC
from peft_kernels.core.backends.self_test.gemms import WGMMA as WGMMA_ROWS

from ..lib import cases, correctness, layers
from ..lib.cases import DEQUANTIZE, DX, FORWARD, QLORA, Shape
from ..lib.harness import Case, Contenders, Entry, contenders, copies
from ..lib.layers import BNB, LayerCache, Weights
from ..lib.report import OURS
from ..ops import experts, optimizers
from .roofline import Gpu
from .step_cases import DTYPE, LIMITS, Parts
from .step_estimate import Ours

SHAPES: Sequence[Shape] = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
ROWS = ((1, 16, 128, 2048), (4, 8, 32, 64, 512, 8192))
"""First those of a decoded token, a small batch, a large one and a training step."""
TINY_SHAPES: Sequence[Shape] = ((192, 256), (72, 64))
STEPS: Sequence[tuple[str, optimizers.Shapes]] = (
    (optimizers.ONE, optimizers.FIVE_MILLION),
    (optimizers.MANY, optimizers.LORA),
    (optimizers.HUNDRED, optimizers.HUNDRED_MILLION),
)
TINY_STEPS: Sequence[tuple[str, optimizers.Shapes]] = (
    (optimizers.ONE, [(72, 64)]),
    (optimizers.MANY, [(16, 300), (5, 7), (192, 256)]),
)
TINY_ROWS = ((1, 5, 16, 33, 130),)
EXPERTS = experts.Shape(32, 2, 1536, 2048), (1024, 32768)
"""A quarter of the experts of Qwen3-30B-A3B, and tokens that are 64 and 2048 rows of an expert on average."""
TINY_EXPERTS = experts.Shape(4, 2, 80, 64), (9,)
CHECKED_ROWS = 256
"""Rows of a GEMM that are checked: fp64 is slow on most cards."""
CUBLAS, UNFUSED = "cuBLAS bf16", "dequantise + cuBLAS"
CUBLAS_FROZEN = "cuBLAS bf16 (no LoRA)"
WGMMA, WGMMA_DX, BY_MMA_SYNC = "wgmma", "wgmma-dx", "ours by mma.sync"
TITLES = cases.TITLES | {WGMMA: "LinearWgmma, forward", WGMMA_DX: "LinearWgmma, backward to x"}
BESIDE = ("triton", "reference")
"""Back ends that also compete in GEMMs, unless they are ours."""

Call = Callable[[Tensor], Tensor]
Way = Callable[[], AbstractContextManager[Any]]
Ways = Mapping[str, Way]
"""Contexts to call our kernels in, by contender."""


class Suite:
    """The cases for one device. `tiny`: small shapes for checking, with tails of every kind."""

    def __init__(self, device: str, tiny: bool, cache: int) -> None:
        self.device, self.tiny, self.cache = device, tiny, cache
        self._weights: Weights | None = None
        self._layers: tuple[str, Shape, LayerCache] | None = None

    def cases(self) -> list[Case]:
        """The most important rows of every shape first: time may run out."""
        found: list[Case] = []
        for turn, rows in enumerate(TINY_ROWS if self.tiny else ROWS):
            for shape in TINY_SHAPES if self.tiny else SHAPES:
                found += [self.case(FORWARD, shape, m, self.forward) for m in rows]
                if turn == 0:
                    found.append(self.case(DEQUANTIZE, shape, None, self.dequantize))
                found += [self.case(QLORA, shape, m, self.lora) for m in rows]
                found += [self.case(DX, shape, m, self.dx) for m in rows]
            if turn == 0:
                steps = TINY_STEPS if self.tiny else STEPS
                found += [optimizers.case(group, shapes, build=self.step) for group, shapes in steps]
                found += Parts(self.device, self.tiny, self.cache, self.release).cases()
                of_experts, tokens = TINY_EXPERTS if self.tiny else EXPERTS
                found += [
                    experts.experts(group, of_experts, m, DTYPE, self.device)
                    for m in tokens for group in (experts.FORWARD, experts.QLORA)
                ]  # fmt: skip
        return found

    def wgmma_cases(self, backend: Any) -> list[Case]:
        """LinearWgmma compared with our kernels for mma.sync and others, if the back end has it here."""
        if not hasattr(backend, "with_kernels"):
            return []
        with backend.with_kernels(WGMMA_ROWS):
            if "wgmma" not in backend.extension.plan(64, 64, 64, BLOCKSIZE, "bfloat16")[0]:
                return []
        kernels = {OURS: WGMMA_ROWS, BY_MMA_SYNC: MMA_SYNC}
        ways = {name: partial(backend.with_kernels, row) for name, row in kernels.items()}
        shapes, rows = (
            (TINY_SHAPES, (64, 130)) if self.tiny else (SHAPES, (64, 128, 256, 512, 1024, 2048, 4096))
        )
        return [
            self.case(group, shape, m, partial(entries, ways=ways))
            for shape in shapes
            for group, entries in ((WGMMA, self.forward), (WGMMA_DX, self.dx))
            for m in rows
        ]

    def step(self, shapes: optimizers.Shapes) -> Contenders:
        """Contenders of an optimizer step, in as many copies as the rotation needs."""
        self.release()
        size = sum(a * b for a, b in shapes)
        count = 2 if self.tiny else copies(size * optimizers.STEP_BYTES, 3, self.cache)
        return contenders(optimizers.entries(shapes, self.device, count))

    def release(self) -> None:
        """Frees what is kept for later cases."""
        self._weights = None
        self._free_layers()

    def _free_layers(self) -> None:
        self._layers = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def case(self, group: str, shape: Shape, m: int | None, entries: Callable[..., Sequence[Entry]]) -> Case:
        def build() -> Contenders:
            weights = self.weights(shape)
            found = entries(weights, *([] if m is None else [m]))
            return contenders(found, cache=self.layers(group, shape))

        return Case(group, *shape, m, DTYPE, build, title=TITLES[group])

    def weights(self, shape: Shape) -> Weights:
        """Only those of the last shape are kept in memory."""
        found = self._weights
        if found is None or (found.out_features, found.in_features) != shape:
            self._weights = self._layers = None
            found = self._weights = Weights(*shape, torch.bfloat16, device=self.device)
        return found

    def layers(self, group: str, shape: Shape) -> LayerCache:
        """The layers of the last group and shape; others are freed, as GPU memory is scarce."""
        if self._layers is None or self._layers[:2] != (group, shape):
            self._free_layers()
            self._layers = group, shape, LayerCache()
        return self._layers[2]

    def copies(self, weights: Weights, contenders: int) -> tuple[int, int]:
        return (2, 2) if self.tiny else cases.weight_copies(weights, contenders, self.cache)

    def forward(self, weights: Weights, m: int, ways: Ways | None = None) -> list[Entry]:
        def ours(weight: pk.NF4Weight) -> Call:
            return partial(pk.nf4_linear, weight=weight)

        def theirs(count: int) -> Sequence[Call]:
            return layers.bnb_linears(weights, count, "eval")

        return self.gemm(weights, weights.x(m), False, ours, lambda weight: weight, theirs, ways)

    def dx(self, weights: Weights, m: int, ways: Ways | None = None) -> list[Entry]:
        dy = weights.dy(m)

        def ours(weight: pk.NF4Weight) -> Call:
            parts = (weight.packed, weight.absmax, weight.absmax2, weight.offset, weight.blocksize)
            kernel = dispatch.kernel("nf4_linear_dx", (dy, *parts, weights.in_features))
            return lambda dy: kernel(dy, *parts, weights.in_features)

        def bnb(layer: Any) -> Call:
            dequantize = layers.bitsandbytes().functional.dequantize_4bit
            return lambda dy: dy @ dequantize(layer.weight.data, layer.weight.quant_state)

        def theirs(count: int) -> Sequence[Call]:
            return [bnb(layer) for layer in layers.bnb_linears(weights, count, "train")]

        return self.gemm(weights, dy, True, ours, Tensor.t, theirs, ways)

    def gemm(
        self,
        weights: Weights,
        x: Tensor,
        is_backward: bool,
        ours: Callable[[pk.NF4Weight], Call],
        orient: Callable[[Tensor], Tensor],
        theirs: Callable[[int], Sequence[Call]],
        ways: Ways | None,
    ) -> list[Entry]:
        """Contenders of x times the weight, which `orient` transposes for the backward."""
        others = [name for name in BESIDE if name != dispatch.forced()]
        ways = ways or {OURS: nullcontext, **{name: partial(pk.use_backend, name) for name in others}}
        rows = checked_rows(len(x))
        expected = correctness.linear(x[rows], orient(weights.exact))
        packed, dense = self.copies(weights, 3 + len(ways))

        def entry(name: str, make: Callable[[], Sequence[Any]], needs: str = "") -> Entry:
            verify = expected.strict if name in ways and name not in BESIDE else expected.sane

            def remark(layer: Any) -> str:
                with ways[OURS]():
                    return _plan(weights, len(x))[is_backward] if name == OURS else ""

            def checked(got: dict[str, Tensor]) -> float:
                return verify({"y": got["y"][rows]})

            return Entry(name, make, checked, needs, lambda layer: layers.forward_call(layer, x), remark)

        def unfused(weight: pk.NF4Weight) -> Call:
            return lambda x: F.linear(x, orient(weight.dequantize(x.dtype)))

        def plain() -> Sequence[Call]:
            return [partial(F.linear, weight=orient(weights.rounded.clone())) for _ in range(dense)]

        return [
            *(entry(name, partial(_calls, way, ours, weights, packed)) for name, way in ways.items()),
            entry(CUBLAS, plain),
            entry(UNFUSED, lambda: [unfused(w) for w in layers.nf4_copies(weights, packed)]),
            entry("bnb", lambda: theirs(packed), BNB),
        ]

    def lora(self, weights: Weights, m: int) -> list[Entry]:
        entries, call = cases.training_entries(weights, m, True, self.copies(weights, 3), CUBLAS_FROZEN)
        return [replace(entry, call=call) for entry in entries]

    def dequantize(self, weights: Weights) -> list[Entry]:
        return cases.dequantize_entries(weights, self.copies(weights, 2)[0])


def _calls(way: Way, make: Callable[[pk.NF4Weight], Call], weights: Weights, count: int) -> list[Call]:
    """Calls on a back end or with kernels of it. RuntimeError if that cannot be used."""
    with way():
        calls = [make(weight) for weight in layers.nf4_copies(weights, count)]

    def within(call: Call) -> Call:
        def run(t: Tensor) -> Tensor:
            with way():
                return call(t)

        return run

    return calls if way is nullcontext else [within(call) for call in calls]


def _plan(weights: Weights, m: int) -> tuple[str, str]:
    """The kernels that ours uses, forward and backward, if the back end reports them."""
    plan = getattr(BACKENDS[dispatch.forced() or "reference"], "plan", None)
    if plan is None:
        return "", ""
    shape = (weights.out_features, weights.in_features)
    forward, backward = plan(m, *shape, weights.nf4.blocksize, weights.dtype)
    return f"by {forward}", f"by {backward}"


def checked_rows(m: int) -> Tensor:
    """Rows to check: all, or evenly spaced ones from the first to the last."""
    return torch.linspace(0, m - 1, min(m, CHECKED_ROWS), dtype=torch.float64).round().long()


def roofline(case: Case, gpu: Gpu) -> float | None:
    """Seconds that the device needs at least, or None if the case is a linear layer with LoRA."""
    if case.group in LIMITS:
        return LIMITS[case.group](Ours(gpu)).seconds
    if case.group == DEQUANTIZE:
        return gpu.dequantize(case.out_features, case.in_features)
    if case.group in optimizers.TITLES:
        return case.out_features * case.in_features * optimizers.STEP_BYTES / gpu.bandwidth
    if case.group in (FORWARD, DX, WGMMA, WGMMA_DX) and case.m is not None:
        return gpu.linear(case.out_features, case.in_features, case.m)
    return None
