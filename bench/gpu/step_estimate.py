"""A whole QLoRA step of an 8B model on a GPU, estimated from bytes and FLOPs: no GPU needed.

Each part of the step runs on the meta device, forward and backward, while a dispatch mode adds up the bytes
that its ops read and write and their FLOPs: an op is one kernel, which takes as long as memory or the matrix
units need, whichever is longer. With many rows NF4 weights are dequantised first, by another kernel. The host
is left out, which is ahead of such a card, and the optimizer, which takes under 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import peft_kernels as pk
from peft_kernels import AdaptedLinear, Adapter
from peft_kernels.core import dispatch

from ..lib import report
from ..lib.layers import RANK, SCALING
from ..lib.report import OURS, Figures, Progress, Timing, three_digits
from ..ops import losses
from .decoder_layer import LLAMA, Shape, Sizes, add_norm, empty, gated, norm, rotary
from .roofline import BY_ARCHITECTURE, NF4_BYTES, Gpu

BYTES = 2
"""Of an element in bf16."""
REACHED = 0.9
"""Share of a card's bandwidth that copies reach."""
ATTENTION_REACHED = 0.6
"""Share of the matrix units that fused attention reaches (Dao 2023, forward and backward on an H100)."""
LOSS_ROWS, LOSS_PASSES = 1024, 3
"""Rows whose logits are in memory at a time (csrc/cuda/loss), and how often a kernel moves these."""
LAUNCH = 2e-6
"""Seconds from the end of a kernel to the full speed of the next."""
WGMMA_REACHED = 0.9 / 1.05
"""Share of cuBLAS' speed that LinearWgmma is taken to reach, and how much faster it must be to be used."""
STOCK, WHOLE = "stock", "whole step"


@dataclass(frozen=True)
class Cost:
    """What ops ask of a card."""

    seconds: float = 0.0
    ops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.ops + other.ops)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.seconds * times, self.ops * times)

    @property
    def ms(self) -> str:
        return three_digits(1e3 * self.seconds)


Costs = tuple[Cost, Cost]
"""Of forward and backward."""


def added(costs: Iterable[Costs]) -> Costs:
    forward, backward = zip(*costs, strict=True)
    return sum(forward, Cost()), sum(backward, Cost())


def reached(gpu: Gpu) -> Gpu:
    """The card with the bandwidth that its kernels reach, for the estimates below."""
    return replace(gpu, bandwidth=REACHED * gpu.bandwidth)


def kernel(gpu: Gpu, nbytes: float, flops: float = 0.0) -> Cost:
    return Cost(gpu.seconds(nbytes, flops), 1)


class Counted(TorchDispatchMode):
    """Adds up the ops that run inside it."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.cost = gpu, Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if moved and not func.is_view and func not in NO_KERNEL:
            flops = flop_registry.get(func.overloadpacket, lambda *args, **kwargs: 0)
            self.cost += kernel(self.gpu, sum(map(_nbytes, moved)), flops(*args, **kwargs, out_val=out))
        return out


NO_KERNEL = {
    getattr(torch.ops.aten, name).default
    for name in ("detach", "_unsafe_view", "empty_like", "new_empty", "empty_strided", "alias", "lift_fresh")
} | {torch.ops.aten.empty.memory_format}
"""Ops that only allocate, or make a view."""


def _nbytes(tensor: Tensor) -> int:
    """Of what is read: an expanded dimension counts once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()


def counted(gpu: Gpu, call: Callable[..., Any], *shapes: tuple[int, ...]) -> Costs:
    """Forward and backward of a call on tensors of these shapes, all of which need gradients."""
    given = [empty(*shape, needs_grad=True) for shape in shapes]
    with Counted(gpu) as forward:
        out = call(*given)
    out = out if isinstance(out, tuple) else (out,)
    gradients = [torch.empty_like(t) for t in out]
    with Counted(gpu) as backward:
        torch.autograd.grad(out, given, gradients)
    return forward.cost, backward.cost


def _packed(n: int, k: int) -> pk.NF4Weight:
    """An NF4 weight without data."""
    with dispatch.use_backend("reference"):
        return pk.NF4Weight.quantize(empty(n, k))


class Stock:
    """What transformers and PEFT compute, in plain torch, on bitsandbytes' NF4 weights."""

    rms_norm, add_rms_norm = staticmethod(norm), staticmethod(add_norm)
    rotate, activate = staticmethod(rotary), staticmethod(gated)

    def __init__(self, gpu: Gpu, sizes: Sizes = LLAMA) -> None:
        self.gpu, self.sizes = gpu, sizes

    def norm(self) -> Costs:
        weight = empty(self.sizes.hidden)
        return counted(self.gpu, lambda x: self.rms_norm(x, weight), self.sizes.states)

    def trained_norm(self) -> Costs:
        return counted(self.gpu, self.rms_norm, self.sizes.states, (self.sizes.hidden,))

    def add(self) -> Costs:
        return counted(self.gpu, torch.add, self.sizes.states, self.sizes.states)

    def add_norm(self) -> Costs:
        """A residual sum and its norm; backward adds the gradients of both uses of the sum."""
        weight, states = empty(self.sizes.hidden), self.sizes.states
        return counted(self.gpu, lambda x, y: self.add_rms_norm(x, y, weight), states, states)

    def rotary(self) -> Costs:
        angles = self.sizes.angles()
        return counted(self.gpu, lambda q, k: self.rotate(q, k, *angles), self.sizes.queries, self.sizes.keys)

    def activation(self) -> Costs:
        return counted(self.gpu, self.activate, self.sizes.gated, self.sizes.gated)

    def linear(self, group: Sequence[Shape]) -> Costs:
        """Layers with LoRA that share their input. Weights are dequantised in both directions."""
        layers = [(empty(n, k), empty(RANK, k), empty(n, RANK)) for n, k in group]

        def call(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(F.linear(x, w) + SCALING * F.linear(F.linear(x, a), b) for w, a, b in layers)

        forward, backward = counted(self.gpu, call, (self.sizes.tokens, group[0][1]))
        weights = self.dequantized(group)
        return forward + weights, backward + weights

    def dequantized(self, weights: Iterable[Shape]) -> Cost:
        return sum((kernel(self.gpu, n * k * (NF4_BYTES + 2)) for n, k in weights), Cost())

    def loss(self) -> Costs:
        """Of all logits."""
        weight, labels = empty(self.sizes.vocabulary, self.sizes.hidden), self.sizes.labels().flatten()
        shape = self.sizes.tokens, self.sizes.hidden
        return counted(self.gpu, lambda x: losses.losses(x, weight, labels), shape)

    def attention(self) -> Costs:
        """Fused, in both columns."""
        queries, keys = prod(self.sizes.queries), prod(self.sizes.keys)
        flops = 4 * queries * self.sizes.length / 2 / ATTENTION_REACHED
        nbytes = BYTES * (2 * queries + 2 * keys)
        return kernel(self.gpu, nbytes, flops), kernel(self.gpu, 2 * nbytes, 2.5 * flops)


class Ours(Stock):
    """A model after `pk.patch` on back end cuda."""

    rms_norm, add_rms_norm = staticmethod(pk.rms_norm), staticmethod(pk.add_rms_norm)
    rotate = staticmethod(pk.rotary)
    activate = staticmethod(lambda gate, up: dispatch.call("gated_activation", gate, up, "silu"))

    def linear(self, group: Sequence[Shape]) -> Costs:
        """What adapters add is written first, and GEMMs add to it."""
        layers = [
            AdaptedLinear(
                _packed(n, k),
                adapters=[Adapter(empty(RANK, k, needs_grad=True), empty(n, RANK, needs_grad=True), 1.0)],
            )
            for n, k in group
        ]
        shape, outputs = (self.sizes.tokens, group[0][1]), sum(n for n, _ in group)
        forward, backward = counted(self.gpu, lambda x: tuple(pk.multi_lora_linear(x, layers)), shape)
        weights = self.dequantized(group)
        deltas = [kernel(self.gpu, BYTES * self.sizes.tokens * features) for features in (outputs, shape[1])]
        return forward + weights + deltas[0], backward + weights + deltas[1]

    def loss(self, packed: bool = False) -> Costs:
        """One kernel turns logits into their gradients. A packed head is dequantised for each GEMM."""
        shape, labels = (self.sizes.vocabulary, self.sizes.hidden), self.sizes.labels()
        weight = _packed(*shape) if packed else empty(*shape)
        forward, backward = counted(
            self.gpu, lambda x: pk.linear_cross_entropy(x, weight, labels), self.sizes.states
        )
        logits = kernel(self.gpu, LOSS_PASSES * BYTES * self.sizes.tokens * self.sizes.vocabulary)
        weights = self.dequantized([shape]) * (2 * -(-self.sizes.tokens // LOSS_ROWS) * packed)
        return forward + logits + weights, backward


Part = tuple[str, Callable[[Any], Costs]]
OF_A_LAYER: tuple[Part, ...] = (
    ("linear layers with LoRA", lambda m: added(map(m.linear, m.sizes.groups))),
    ("norms and residual sums", lambda m: added([m.norm(), m.add_norm(), m.add()])),
    ("rotary embedding", lambda m: m.rotary()),
    ("gated activation", lambda m: m.activation()),
    ("attention", lambda m: m.attention()),
)
OTHERS: tuple[Part, ...] = (("last norm", lambda m: m.norm()), ("head and loss", lambda m: m.loss()))


def layer(model: Stock) -> Costs:
    """Forward and backward of a decoder layer."""
    return added(of(model) for _, of in OF_A_LAYER)


def step(model: Stock) -> dict[str, Cost]:
    """The cost of each part of a step, in which checkpointing repeats the forward of a layer."""
    found = {}
    for name, of in OF_A_LAYER:
        forward, backward = of(model)
        found[name] = (forward * 2 + backward) * model.sizes.layers
    for name, of in OTHERS:
        found[name] = sum(of(model), Cost())
    return {**found, WHOLE: sum(found.values(), Cost())}


def fused_up_to(gpu: Gpu, n: int, k: int, share: float) -> int:
    """The most rows for which a fused GEMM takes no longer than dequantise + cuBLAS, another kernel."""
    extra = LAUNCH + gpu.dequantize(n, k)

    def saves(m: int) -> bool:
        return gpu.linear(n, k, m, share) <= extra + gpu.linear(n, k, m, weight=BYTES)

    return max((m for m in range(32, 1 << 14, 32) if saves(m)), default=0)


@dataclass(frozen=True)
class Case:
    """The parts of a step, or for each weight the rows up to which to fuse its GEMMs."""

    gpu: Gpu
    rows: bool = False
    seconds = 5.0

    @property
    def name(self) -> str:
        return f"estimate-{'rows-' * self.rows}{self.gpu.slug}"

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> Figures:
        gpu = reached(self.gpu)
        if self.rows:
            shares = {"by mma.sync": gpu.mma_sync, "by wgmma or the like": WGMMA_REACHED}
            title = f"rows up to which to fuse on {gpu.name}, estimated"
            found = Figures(self, title=title, forms=dict.fromkeys(shares, "d"))
            for n, k in (shape for group in LLAMA.groups for shape in group):
                rows = {name: fused_up_to(gpu, n, k, share) for name, share in shares.items()}
                found.values[f"{n}x{k}"] = rows
            return found
        steps = {f"{STOCK} ms": step(Stock(gpu)), f"{OURS} ms": step(Ours(gpu))}
        title = f"a step on {gpu.name}, estimated"
        found = Figures(self, title=title, forms=dict.fromkeys(steps, ""))
        for part in steps[f"{OURS} ms"]:
            found.values[part] = {name: 1e3 * costs[part].seconds for name, costs in steps.items()}
        return found


def standard(dtype: str) -> list[Case]:
    gpus = [BY_ARCHITECTURE[architecture] for architecture in (80, 90, 100)]
    return [Case(gpu, rows) for rows in (False, True) for gpu in gpus]
