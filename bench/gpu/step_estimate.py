"""A whole QLoRA step of an 8B model on a GPU, estimated from bytes and FLOPs: no GPU needed.

Each part of the step runs on the meta device, forward and backward, while a dispatch mode adds up the bytes
that its ops read and write and their FLOPs: an op is one kernel, which takes as long as memory or the matrix
units need, whichever is longer. With many rows NF4 weights are dequantised first, by another kernel. The host
is left out, which is ahead of such a card, and the optimizer, which takes under 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import peft_kernels as pk
from peft_kernels import AdaptedLinear, Adapter
from peft_kernels.core import dispatch

from ..lib import report
from ..lib.layers import RANK
from ..lib.report import OURS, missing, three_digits
from .decoder_layer import LLAMA, Shape, Sizes, empty
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
STOCK = "stock"
GOAL_MS = 750.0


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


def counted(gpu: Gpu, call: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Cost, Cost]:
    """Forward and backward of a call on tensors of these shapes, all of which need gradients."""
    given = [empty(*shape, needs_grad=True) for shape in shapes]
    with Counted(gpu) as forward:
        out = call(*given)
    out = out if isinstance(out, tuple) else (out,)
    gradients = [torch.empty_like(t) for t in out]
    with Counted(gpu) as backward:
        torch.autograd.grad(out, given, gradients)
    return forward.cost, backward.cost


def _sum(costs: Iterable[tuple[Cost, Cost]]) -> tuple[Cost, Cost]:
    forward, backward = Cost(), Cost()
    for one in costs:
        forward, backward = forward + one[0], backward + one[1]
    return forward, backward


def _peft_layer(n: int, k: int) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    with torch.device("meta"):
        base = nn.Linear(k, n, bias=False).requires_grad_(False)
        return Linear(base, "default", config=LoraConfig(r=RANK), r=RANK).to(torch.bfloat16)


def _packed(n: int, k: int) -> pk.NF4Weight:
    """An NF4 weight without data."""
    with dispatch.use_backend("reference"):
        return pk.NF4Weight.quantize(empty(n, k))


def _dequantize(gpu: Gpu, n: int, k: int) -> Cost:
    return kernel(gpu, n * k * (NF4_BYTES + 2))


class Stock:
    """transformers' modules, PEFT's LoRA, bitsandbytes' NF4 weights, torch's loss of all logits."""

    def __init__(self, gpu: Gpu, sizes: Sizes = LLAMA) -> None:
        self.gpu, self.sizes = gpu, sizes

    def norm(self) -> tuple[Cost, Cost]:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(self.sizes.hidden).to("meta", torch.bfloat16).requires_grad_(False)
        return counted(self.gpu, norm, self.sizes.states)

    def add(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, torch.add, self.sizes.states, self.sizes.states)

    def add_norm(self) -> tuple[Cost, Cost]:
        """A residual sum and its norm; backward adds the gradients of both uses of the sum."""
        forward, backward = _sum([self.add(), self.norm()])
        return forward, backward + kernel(self.gpu, 3 * BYTES * prod(self.sizes.states))

    def rotary(self) -> tuple[Cost, Cost]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def call(q: Tensor, k: Tensor) -> Any:
            return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *self.sizes.angles())

        return counted(self.gpu, call, self.sizes.queries, self.sizes.keys)

    def activation(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, lambda gate, up: F.silu(gate) * up, self.sizes.gated, self.sizes.gated)

    def linear(self, group: Sequence[Shape]) -> tuple[Cost, Cost]:
        """Layers with LoRA that share their input. Weights are dequantised in both directions."""
        costs, tokens = [], self.sizes.tokens
        for n, k in group:
            forward, backward = counted(self.gpu, _peft_layer(n, k), (tokens, k))
            weight = _dequantize(self.gpu, n, k)
            costs.append((forward + weight, backward + weight))
        forward, backward = _sum(costs)
        more = kernel(self.gpu, 3 * BYTES * tokens * group[0][1]) * (len(group) - 1)  # autograd's sums
        return forward, backward + more

    def loss(self) -> tuple[Cost, Cost]:
        from transformers.loss.loss_utils import ForCausalLMLoss

        vocabulary, states = self.sizes.vocabulary, self.sizes.states
        labels = self.sizes.labels()
        weight = empty(vocabulary, states[-1])
        return counted(self.gpu, lambda x: ForCausalLMLoss(F.linear(x, weight), labels, vocabulary), states)

    def attention(self) -> tuple[Cost, Cost]:
        """Fused, in both columns."""
        queries, keys = prod(self.sizes.queries), prod(self.sizes.keys)
        flops = 4 * queries * self.sizes.length / 2 / ATTENTION_REACHED
        nbytes = BYTES * (2 * queries + 2 * keys)
        return kernel(self.gpu, nbytes, flops), kernel(self.gpu, 2 * nbytes, 2.5 * flops)


class Ours(Stock):
    """A model after `pk.patch` on back end cuda."""

    def norm(self) -> tuple[Cost, Cost]:
        weight = empty(self.sizes.hidden)
        return counted(self.gpu, lambda x: pk.rms_norm(x, weight), self.sizes.states)

    def trained_norm(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, pk.rms_norm, self.sizes.states, (self.sizes.hidden,))

    def add_norm(self) -> tuple[Cost, Cost]:
        weight, states = empty(self.sizes.hidden), self.sizes.states
        return counted(self.gpu, lambda x, y: pk.add_rms_norm(x, y, weight), states, states)

    def rotary(self) -> tuple[Cost, Cost]:
        angles = self.sizes.angles()
        return counted(self.gpu, lambda q, k: pk.rotary(q, k, *angles), self.sizes.queries, self.sizes.keys)

    def activation(self) -> tuple[Cost, Cost]:
        def call(gate: Tensor, up: Tensor) -> Any:
            return dispatch.call("gated_activation", gate, up, "silu")

        return counted(self.gpu, call, self.sizes.gated, self.sizes.gated)

    def linear(self, group: Sequence[Shape]) -> tuple[Cost, Cost]:
        layers = [
            AdaptedLinear(
                _packed(n, k),
                adapters=[Adapter(empty(RANK, k, needs_grad=True), empty(n, RANK, needs_grad=True), 1.0)],
            )
            for n, k in group
        ]
        shape = self.sizes.tokens, group[0][1]
        forward, backward = counted(self.gpu, lambda x: tuple(pk.multi_lora_linear(x, layers)), shape)
        weights = sum((_dequantize(self.gpu, n, k) for n, k in group), Cost())
        outputs = sum(n for n, _ in group)
        return forward + weights + self.deltas(outputs), backward + weights + self.deltas(shape[1])

    def deltas(self, features: int) -> Cost:
        """What adapters add is written first, and GEMMs add to it."""
        return kernel(self.gpu, BYTES * self.sizes.tokens * features)

    def loss(self, packed: bool = False) -> tuple[Cost, Cost]:
        """One kernel turns logits into their gradients. A packed head is dequantised for each GEMM."""
        shape, labels = (self.sizes.vocabulary, self.sizes.hidden), self.sizes.labels()
        weight = _packed(*shape) if packed else empty(*shape)
        forward, backward = counted(
            self.gpu, lambda x: pk.linear_cross_entropy(x, weight, labels), self.sizes.states
        )
        logits = kernel(self.gpu, LOSS_PASSES * BYTES * self.sizes.tokens * self.sizes.vocabulary)
        weights = _dequantize(self.gpu, *shape) * (2 * -(-self.sizes.tokens // LOSS_ROWS) * packed)
        return forward + logits + weights, backward


Part = tuple[str, Callable[[Any], tuple[Cost, Cost]]]
OF_A_LAYER: tuple[Part, ...] = (
    ("linear layers with LoRA", lambda m: _sum(map(m.linear, m.sizes.groups))),
    ("norms and residual sums", lambda m: _sum([m.norm(), m.add_norm(), m.add()])),
    ("rotary embedding", lambda m: m.rotary()),
    ("gated activation", lambda m: m.activation()),
    ("attention", lambda m: m.attention()),
)
OTHERS: tuple[Part, ...] = (("last norm", lambda m: m.norm()), ("head and loss", lambda m: m.loss()))
"""Name, forward and backward."""


def layer(model: Stock) -> tuple[Cost, Cost]:
    """Forward and backward of a decoder layer."""
    return _sum(of(model) for _, of in OF_A_LAYER)


def step(model: Stock) -> dict[str, Cost]:
    """The cost of each part of a step, in which checkpointing repeats the forward of a layer."""
    found = {}
    for name, of in OF_A_LAYER:
        forward, backward = of(model)
        found[name] = (forward * 2 + backward) * model.sizes.layers
    for name, of in OTHERS:
        forward, backward = of(model)
        found[name] = forward + backward
    return found


def fused_up_to(gpu: Gpu, n: int, k: int, share: float) -> int:
    """The most rows for which a fused GEMM takes no longer than dequantise + cuBLAS, another kernel."""
    extra = LAUNCH + gpu.dequantize(n, k)

    def saves(m: int) -> bool:
        return gpu.linear(n, k, m, share) <= extra + gpu.linear(n, k, m, weight=BYTES)

    return max((m for m in range(32, 1 << 14, 32) if saves(m)), default=0)


@dataclass(frozen=True)
class Case:
    gpu: Gpu
    seconds = 5.0

    @property
    def name(self) -> str:
        return f"estimate-{self.gpu.slug}"

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Estimate:
        if reason := missing("transformers peft"):
            return Estimate(self, absent={self.name: reason})
        gpu = reached(self.gpu)
        return Estimate(self, steps={STOCK: step(Stock(gpu)), OURS: step(Ours(gpu))})


@dataclass
class Estimate(report.Outcome):
    case: Case
    steps: Mapping[str, dict[str, Cost]] = field(default_factory=dict)

    def whole(self, name: str) -> Cost:
        return sum(self.steps[name].values(), Cost())

    def parts(self) -> Iterator[str]:
        for name in self.steps:
            yield f"{name} {self.whole(name).ms} ms"

    def data(self) -> dict[str, Any]:
        steps = {n: {part: asdict(cost) for part, cost in costs.items()} for n, costs in self.steps.items()}
        return {"group": "estimate", "steps": steps}

    def goals(self) -> Iterator[tuple[str, bool | None]]:
        if self.steps and self.case.gpu.architecture == 90:
            found = 1e3 * self.whole(OURS).seconds
            yield f"{found:.0f} ms, at most {GOAL_MS:.0f}", found <= GOAL_MS

    @classmethod
    def tables(cls, outcomes: Sequence[Estimate], unit: str) -> Iterator[tuple[str, str]]:
        for found in (outcome for outcome in outcomes if outcome.steps):
            stock, ours = ({**found.steps[name], "whole step": found.whole(name)} for name in (STOCK, OURS))
            rows = [[part, stock[part].ms, ours[part].ms] for part in stock]
            titles = "", f"{STOCK} ms", f"{OURS} ms"
            yield f"a step on {found.case.gpu.name}, estimated", report.table(titles, rows)
            gpu = reached(found.case.gpu)
            rows = [
                [f"{n}x{k}", *(str(fused_up_to(gpu, n, k, share)) for share in (gpu.mma_sync, WGMMA_REACHED))]
                for n, k in report.unique(shape for group in LLAMA.groups for shape in group)
            ]
            titles = "weight", "by mma.sync", "by wgmma or the like"
            yield f"rows up to which to fuse on {gpu.name}, estimated", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(BY_ARCHITECTURE[architecture]) for architecture in (80, 90, 100)]
