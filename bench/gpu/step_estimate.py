"""A whole QLoRA step of an 8B model on a GPU, estimated from bytes, FLOPs and launches: no GPU needed.

Each part of the step runs on the meta device, forward and backward, while a dispatch mode adds up the bytes
that its ops read and write and the FLOPs of its GEMMs; an op is one kernel. The kernels of our NF4 layers and
of our loss, which are more than one, are listed here. A kernel takes as long as memory or the matrix units
need, whichever is longer. Left out: the host, which is ahead of such a card, and the optimizer, under 1 ms.
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

from peft_kernels.core import dispatch
from peft_kernels.ops.block.rms_norm import add_rms_norm, rms_norm
from peft_kernels.ops.block.rotary import rotary

from ..lib import report
from ..lib.layers import RANK
from ..lib.report import OURS, missing, three_digits
from .roofline import BY_ARCHITECTURE, NF4_BYTES, Gpu

Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Of the batch of a step, and of its model."""

    sequences: int
    length: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    features: int
    vocabulary: int
    layers: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def states(self) -> tuple[int, ...]:
        return self.sequences, self.length, self.hidden

    @property
    def gated(self) -> tuple[int, ...]:
        return self.sequences, self.length, self.intermediate

    @property
    def queries(self) -> tuple[int, ...]:
        return self.sequences, self.length, self.heads, self.features

    @property
    def keys(self) -> tuple[int, ...]:
        return self.sequences, self.length, self.key_heads, self.features

    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position, without data."""
        cos = torch.empty(1, self.length, self.features, dtype=torch.bfloat16, device="meta")
        return cos, torch.empty_like(cos)

    @property
    def groups(self) -> tuple[tuple[Shape, ...], ...]:
        """out_features and in_features of a decoder layer's weights, grouped by their input."""
        q, k = ((heads * self.features, self.hidden) for heads in (self.heads, self.key_heads))
        gate = self.intermediate, self.hidden
        return (q, k, k), (q[::-1],), (gate, gate), (gate[::-1],)


LLAMA = Sizes(4, 2048, 4096, 14336, 32, 8, 128, 128_256, 32)
"""4x2048 tokens of Llama-3.1-8B, from its config.json."""
BYTES = 2
"""Of an element in bf16."""
REACHED = 0.9
"""Share of a card's bandwidth that copies reach."""
ATTENTION_REACHED = 0.6
"""Share of the matrix units that fused attention reaches (Dao 2023, forward and backward on an H100)."""
LOSS_ROWS, LOSS_PASSES = 1024, 3
"""Rows whose logits are in memory at a time (csrc/cuda/loss), and how often a kernel moves these."""
STOCK = "stock"
GOAL_MS = 750.0


@dataclass(frozen=True)
class Cost:
    """What kernels ask of a card."""

    seconds: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes, self.launches + other.launches)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.seconds * times, self.bytes * times, self.launches * times)

    def cells(self) -> list[str]:
        return [three_digits(1e3 * self.seconds), three_digits(self.bytes / 1e9), f"{self.launches:,}"]


def reached(gpu: Gpu) -> Gpu:
    """The card with the bandwidth that its kernels reach, for the estimates below."""
    return replace(gpu, bandwidth=REACHED * gpu.bandwidth)


def kernel(gpu: Gpu, elements: float, flops: float = 0.0) -> Cost:
    """A kernel that reads and writes so many elements of bf16."""
    nbytes = BYTES * elements
    return Cost(max(nbytes / gpu.bandwidth, flops / gpu.flops), nbytes, 1)


class Counted(TorchDispatchMode):
    """Adds up the ops that run inside it."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.cost = gpu, Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if moved and not func.is_view and func not in NO_KERNEL:
            flops = _mm_flops(*args) if func is torch.ops.aten.mm.default else 0
            self.cost += kernel(self.gpu, sum(map(_nbytes, moved)) / BYTES, flops)
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


def _mm_flops(a: Tensor, b: Tensor) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def counted(gpu: Gpu, call: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Cost, Cost]:
    """Forward and backward of a call on tensors of these shapes, all of which need gradients."""
    given = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
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


def _dequantize(gpu: Gpu, n: int, k: int) -> Cost:
    return kernel(gpu, n * k * (NF4_BYTES / BYTES + 1))


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
        return forward, backward + kernel(self.gpu, 3 * prod(self.sizes.states))

    def rotary(self) -> tuple[Cost, Cost]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def call(q: Tensor, k: Tensor) -> Any:
            return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *self.sizes.angles())

        return counted(self.gpu, call, self.sizes.queries, self.sizes.keys)

    def activation(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, lambda gate, up: F.silu(gate) * up, self.sizes.gated, self.sizes.gated)

    def linear(self, group: Sequence[Shape]) -> tuple[Cost, Cost]:
        """Layers with LoRA that share their input. Weights are dequantised in both directions: bitsandbytes
        dequantises the scales, adds their offset and dequantises the codes."""
        costs, tokens = [], self.sizes.tokens
        for n, k in group:
            forward, backward = counted(self.gpu, _peft_layer(n, k), (tokens, k))
            weight = replace(_dequantize(self.gpu, n, k), launches=3)
            costs.append((forward + weight, backward + weight))
        forward, backward = _sum(costs)
        more = kernel(self.gpu, 3 * tokens * group[0][1]) * (len(group) - 1)  # autograd's sums
        return forward, backward + more

    def loss(self) -> tuple[Cost, Cost]:
        from transformers.loss.loss_utils import ForCausalLMLoss

        vocabulary, states = self.sizes.vocabulary, self.sizes.states
        labels = torch.empty(states[:2], dtype=torch.int64, device="meta")
        weight = torch.empty(vocabulary, states[-1], dtype=torch.bfloat16, device="meta")
        return counted(self.gpu, lambda x: ForCausalLMLoss(F.linear(x, weight), labels, vocabulary), states)

    def attention(self) -> tuple[Cost, Cost]:
        """One fused kernel forward, three backward, in both columns."""
        queries, keys = prod(self.sizes.queries), prod(self.sizes.keys)
        flops = 4 * queries * self.sizes.length / 2 / ATTENTION_REACHED
        elements = 2 * queries + 2 * keys
        backward = kernel(self.gpu, 2 * elements, 2.5 * flops)
        return kernel(self.gpu, elements, flops), replace(backward, launches=3)


class Ours(Stock):
    """A model after `pk.patch` on back end cuda. Ops that are one kernel are counted, others listed."""

    def norm(self) -> tuple[Cost, Cost]:
        weight = self.norm_weight()
        return counted(self.gpu, lambda x: rms_norm(x, weight), self.sizes.states)

    def trained_norm(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, rms_norm, self.sizes.states, self.norm_weight().shape)

    def add_norm(self) -> tuple[Cost, Cost]:
        weight, states = self.norm_weight(), self.sizes.states
        return counted(self.gpu, lambda x, y: add_rms_norm(x, y, weight), states, states)

    def norm_weight(self) -> Tensor:
        return torch.empty(self.sizes.hidden, dtype=torch.bfloat16, device="meta")

    def rotary(self) -> tuple[Cost, Cost]:
        angles = self.sizes.angles()
        return counted(self.gpu, lambda q, k: rotary(q, k, *angles), self.sizes.queries, self.sizes.keys)

    def activation(self) -> tuple[Cost, Cost]:
        def call(gate: Tensor, up: Tensor) -> Any:
            return dispatch.call("gated_activation", gate, up, "silu")

        return counted(self.gpu, call, self.sizes.gated, self.sizes.gated)

    def linear(self, group: Sequence[Shape]) -> tuple[Cost, Cost]:
        """One kernel for all ranks h = x A^T. A layer's deltas are written first, and its GEMM adds to them.
        Backward: ranks, deltas and the gradients of A in a kernel each for the group, of B in one."""
        tokens, k, ranks = self.sizes.tokens, group[0][1], RANK * len(group)
        forward = kernel(self.gpu, tokens * (k + 2 * ranks) + k * ranks)
        outputs = sum(n for n, _ in group)
        backward = kernel(self.gpu, tokens * (outputs + 2 * ranks) + outputs * RANK)  # dh
        backward += kernel(self.gpu, tokens * (k + 2 * ranks) + k * ranks)  # deltas of dx
        backward += kernel(self.gpu, tokens * (k + 2 * ranks) + k * ranks)  # dA
        backward += kernel(self.gpu, tokens * (outputs + 2 * ranks) + outputs * RANK)  # dB
        for n, _ in group:
            weight, flops = _dequantize(self.gpu, n, k), 2 * tokens * n * k
            forward += weight + kernel(self.gpu, tokens * (n + 2 * RANK) + n * RANK)
            forward += kernel(self.gpu, n * k + tokens * (k + 2 * n), flops)
            backward += weight + kernel(self.gpu, n * k + tokens * (n + 2 * k), flops)
        return forward, backward

    def loss(self, packed: bool = False) -> tuple[Cost, Cost]:
        """Logits of a chunk of rows, a kernel that turns them into gradients, and the gradients of x. A
        packed head is dequantised for each GEMM."""
        tokens, hidden, vocabulary = self.sizes.tokens, self.sizes.hidden, self.sizes.vocabulary
        rows = min(LOSS_ROWS, tokens)
        logits, flops = rows * vocabulary, 2 * rows * vocabulary * hidden
        gemm = kernel(self.gpu, vocabulary * hidden + logits + rows * hidden, flops)
        if packed:
            gemm += _dequantize(self.gpu, vocabulary, hidden)
        chunk = gemm + kernel(self.gpu, LOSS_PASSES * logits) + gemm
        return chunk * -(-tokens // rows), kernel(self.gpu, 2 * tokens * hidden)


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

    def milliseconds(self, name: str) -> float:
        return 1e3 * sum(cost.seconds for cost in self.steps[name].values())

    def parts(self) -> Iterator[str]:
        for name in self.steps:
            yield f"{name} {self.milliseconds(name):.0f} ms"

    def data(self) -> dict[str, Any]:
        steps = {n: {part: asdict(cost) for part, cost in costs.items()} for n, costs in self.steps.items()}
        return {"group": "estimate", "steps": steps}

    def goals(self) -> Iterator[tuple[str, bool | None]]:
        if self.steps and self.case.gpu.architecture == 90:
            found = self.milliseconds(OURS)
            yield f"{found:.0f} ms, at most {GOAL_MS:.0f}", found <= GOAL_MS

    @classmethod
    def tables(cls, outcomes: Sequence[Estimate], unit: str) -> Iterator[tuple[str, str]]:
        for found in outcomes:
            if not found.steps:
                continue
            columns = [costs | {"whole step": sum(costs.values(), Cost())} for costs in found.steps.values()]
            rows = [
                [part, *(cell for costs in columns for cell in costs[part].cells())] for part in columns[0]
            ]
            titles = [f"{name} {column}" for name in found.steps for column in ("ms", "GB", "launches")]
            yield f"a step on {found.case.gpu.name}, estimated", report.table(["", *titles], rows)


def standard(dtype: str) -> list[Case]:
    return [Case(BY_ARCHITECTURE[architecture]) for architecture in (80, 90, 100)]
