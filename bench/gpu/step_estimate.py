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
from ..lib.report import OURS, missing, three_digits
from .roofline import BY_ARCHITECTURE, NF4_BYTES, Gpu

SEQUENCES, LENGTH, RANK = 4, 2048, 16
TOKENS = SEQUENCES * LENGTH
HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, FEATURES, VOCABULARY, LAYERS = 4096, 14336, 32, 8, 128, 128_256, 32
"""Llama-3.1-8B, from its config.json."""
STATES = SEQUENCES, LENGTH, HIDDEN
GATED = SEQUENCES, LENGTH, INTERMEDIATE
QUERIES, KEYS = (SEQUENCES, LENGTH, HEADS, FEATURES), (SEQUENCES, LENGTH, KEY_HEADS, FEATURES)
Shape = tuple[int, int]
GROUPS: tuple[tuple[Shape, ...], ...] = (
    ((HIDDEN, HIDDEN), (KEY_HEADS * FEATURES, HIDDEN), (KEY_HEADS * FEATURES, HIDDEN)),
    ((HIDDEN, HIDDEN),),
    ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN)),
    ((HIDDEN, INTERMEDIATE),),
)
"""out_features and in_features of a decoder layer's weights, grouped by their input."""
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


def kernel(gpu: Gpu, elements: float, flops: float = 0.0) -> Cost:
    """A kernel that reads and writes so many elements of bf16."""
    nbytes = BYTES * elements
    return Cost(max(nbytes / (REACHED * gpu.bandwidth), flops / gpu.flops), nbytes, 1)


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


def _angles() -> tuple[Tensor, Tensor]:
    cos = torch.empty(1, LENGTH, FEATURES, dtype=torch.bfloat16, device="meta")
    return cos, torch.empty_like(cos)


def _norm_weight() -> Tensor:
    return torch.empty(HIDDEN, dtype=torch.bfloat16, device="meta")


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

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def norm(self) -> tuple[Cost, Cost]:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(HIDDEN).to("meta", torch.bfloat16).requires_grad_(False)
        return counted(self.gpu, norm, STATES)

    def add(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, torch.add, STATES, STATES)

    def add_norm(self) -> tuple[Cost, Cost]:
        """A residual sum and its norm; backward adds the gradients of both uses of the sum."""
        forward, backward = _sum([self.add(), self.norm()])
        return forward, backward + kernel(self.gpu, 3 * prod(STATES))

    def rotary(self) -> tuple[Cost, Cost]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def call(q: Tensor, k: Tensor) -> Any:
            return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *_angles())

        return counted(self.gpu, call, QUERIES, KEYS)

    def activation(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, lambda gate, up: F.silu(gate) * up, GATED, GATED)

    def linear(self, group: Sequence[Shape]) -> tuple[Cost, Cost]:
        """Layers with LoRA that share their input. Weights are dequantised in both directions: bitsandbytes
        dequantises the scales, adds their offset and dequantises the codes."""
        costs = []
        for n, k in group:
            forward, backward = counted(self.gpu, _peft_layer(n, k), (TOKENS, k))
            weight = replace(_dequantize(self.gpu, n, k), launches=3)
            costs.append((forward + weight, backward + weight))
        forward, backward = _sum(costs)
        more = kernel(self.gpu, 3 * TOKENS * group[0][1]) * (len(group) - 1)  # autograd's sums
        return forward, backward + more

    def loss(self) -> tuple[Cost, Cost]:
        from transformers.loss.loss_utils import ForCausalLMLoss

        labels = torch.empty(STATES[:2], dtype=torch.int64, device="meta")
        weight = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="meta")
        return counted(self.gpu, lambda x: ForCausalLMLoss(F.linear(x, weight), labels, VOCABULARY), STATES)

    def attention(self) -> tuple[Cost, Cost]:
        """One fused kernel forward, three backward, in both columns."""
        flops = 4 * prod(QUERIES) * LENGTH / 2 / ATTENTION_REACHED
        elements = 2 * prod(QUERIES) + 2 * prod(KEYS)
        backward = kernel(self.gpu, 2 * elements, 2.5 * flops)
        return kernel(self.gpu, elements, flops), replace(backward, launches=3)


class Ours(Stock):
    """A model after `pk.patch` on back end cuda. Ops that are one kernel are counted, others listed."""

    def norm(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, lambda x: rms_norm(x, _norm_weight()), STATES)

    def add_norm(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, lambda x, y: add_rms_norm(x, y, _norm_weight()), STATES, STATES)

    def rotary(self) -> tuple[Cost, Cost]:
        return counted(self.gpu, lambda q, k: rotary(q, k, *_angles()), QUERIES, KEYS)

    def activation(self) -> tuple[Cost, Cost]:
        def call(gate: Tensor, up: Tensor) -> Any:
            return dispatch.call("gated_activation", gate, up, "silu")

        return counted(self.gpu, call, GATED, GATED)

    def linear(self, group: Sequence[Shape]) -> tuple[Cost, Cost]:
        """One kernel for all ranks h = x A^T. A layer's deltas are written first, and its GEMM adds to them.
        Backward: ranks, deltas and the gradients of A in a kernel each for the group, of B in one."""
        k, ranks = group[0][1], RANK * len(group)
        forward = kernel(self.gpu, TOKENS * (k + 2 * ranks) + k * ranks)
        outputs = sum(n for n, _ in group)
        backward = kernel(self.gpu, TOKENS * (outputs + 2 * ranks) + outputs * RANK)  # dh
        backward += kernel(self.gpu, TOKENS * (k + 2 * ranks) + k * ranks)  # deltas of dx
        backward += kernel(self.gpu, TOKENS * (k + 2 * ranks) + k * ranks)  # dA
        backward += kernel(self.gpu, TOKENS * (outputs + 2 * ranks) + outputs * RANK)  # dB
        for n, _ in group:
            weight, flops = _dequantize(self.gpu, n, k), 2 * TOKENS * n * k
            forward += weight + kernel(self.gpu, TOKENS * (n + 2 * RANK) + n * RANK)
            forward += kernel(self.gpu, n * k + TOKENS * (k + 2 * n), flops)
            backward += weight + kernel(self.gpu, n * k + TOKENS * (n + 2 * k), flops)
        return forward, backward

    def loss(self) -> tuple[Cost, Cost]:
        """Logits of a chunk of rows, a kernel that turns them into gradients, and the gradients of x."""
        chunks = -(-TOKENS // LOSS_ROWS)
        logits, head = LOSS_ROWS * VOCABULARY, VOCABULARY * HIDDEN
        flops = 2 * logits * HIDDEN
        gemm = kernel(self.gpu, head + logits + LOSS_ROWS * HIDDEN, flops)
        chunk = gemm + kernel(self.gpu, LOSS_PASSES * logits) + gemm
        return chunk * chunks, kernel(self.gpu, 2 * TOKENS * HIDDEN)


Part = tuple[str, Callable[[Stock], tuple[Cost, Cost]], int, bool]
PARTS: tuple[Part, ...] = (
    ("linear layers with LoRA", lambda m: _sum(map(m.linear, GROUPS)), LAYERS, True),
    ("norms and residual sums", lambda m: _sum([m.norm(), m.add_norm(), m.add()]), LAYERS, True),
    ("rotary embedding", lambda m: m.rotary(), LAYERS, True),
    ("gated activation", lambda m: m.activation(), LAYERS, True),
    ("attention", lambda m: m.attention(), LAYERS, True),
    ("last norm", lambda m: m.norm(), 1, False),
    ("head and loss", lambda m: m.loss(), 1, False),
)
"""Name, forward and backward, number in a model, and whether checkpointing repeats the forward."""


def step(model: Stock) -> dict[str, Cost]:
    """The cost of each part of a step."""
    found = {}
    for name, of, count, is_repeated in PARTS:
        forward, backward = of(model)
        found[name] = (forward * (1 + is_repeated) + backward) * count
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
        return Estimate(self, steps={STOCK: step(Stock(self.gpu)), OURS: step(Ours(self.gpu))})


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
