"""A decoder layer of Llama's kind with LoRA on NF4 weights: in plain torch, as transformers and PEFT compute
it, and with our functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels import AdaptedLinear, Adapter

from ..lib.layers import SCALING, Weights, normal

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
        return empty(1, self.length, self.features), empty(1, self.length, self.features)

    def labels(self) -> Tensor:
        return torch.empty(self.states[:2], dtype=torch.int64, device="meta")

    @property
    def groups(self) -> tuple[tuple[Shape, ...], ...]:
        """out_features and in_features of a decoder layer's weights, grouped by their input."""
        q, k = ((heads * self.features, self.hidden) for heads in (self.heads, self.key_heads))
        gate = self.intermediate, self.hidden
        return (q, k, k), (q[::-1],), (gate, gate), (gate[::-1],)


LLAMA = Sizes(4, 2048, 4096, 14336, 32, 8, 128, 128_256, 32)
"""4x2048 tokens of Llama-3.1-8B, from its config.json."""
EPS = 1e-6
Q, K, V, O, GATE, UP, DOWN = range(7)  # noqa: E741
Call = Callable[[Tensor], Tensor]


def empty(*shape: int, needs_grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=needs_grad)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, weight), total


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]

    return rotated(q), rotated(k)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def angles(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position, bf16 (1, length, features)."""
    half = sizes.features // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=device) / half)
    found = torch.outer(torch.arange(sizes.length, device=device), speeds).repeat(1, 2)[None]
    return found.cos().bfloat16(), found.sin().bfloat16()


class Layer:
    """The weights, and two forwards. Both take cosine and sine, x, and A and B of each linear layer."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes = sizes
        shapes = [shape for group in sizes.groups for shape in group]
        self.weights = [
            Weights(*shape, torch.bfloat16, device=device, seed=seed) for seed, shape in enumerate(shapes)
        ]
        self.norms = [
            1 + normal(sizes.hidden, dtype=torch.bfloat16, seed=seed, scale=0.1, device=device)
            for seed in (6, 7)
        ]

    def adapters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A and B of each layer by name, with values of bf16. What they add is smaller than the layer's own
        output, as in training: scores, and so the errors of attention, would be large."""
        return {
            f"{side}{i}": t.bfloat16().to(dtype)
            for i, w in enumerate(self.weights)
            for side, t in (("a", w.lora_a), ("b", 0.25 * w.lora_b))
        }

    def stock(self, bases: Sequence[Call], cos: Tensor, sin: Tensor, x: Tensor, *adapters: Tensor) -> Tensor:
        def linear(i: int, x: Tensor) -> Tensor:
            a, b = adapters[2 * i : 2 * i + 2]
            return bases[i](x) + SCALING * F.linear(F.linear(x, a), b)

        y = norm(x, self.norms[0])
        q, k, v = self._heads(*(linear(i, y) for i in (Q, K, V)))
        x = x + linear(O, self._attention(*rotary(q, k, cos, sin), v))
        y = norm(x, self.norms[1])
        return x + linear(DOWN, gated(linear(GATE, y), linear(UP, y)))

    def ours(self, cos: Tensor, sin: Tensor, x: Tensor, *adapters: Tensor) -> Tensor:
        pairs = zip(self.weights, adapters[::2], adapters[1::2], strict=True)
        linears = [AdaptedLinear(w.nf4, adapters=[Adapter(a, b, SCALING)]) for w, a, b in pairs]
        y = pk.rms_norm(x, self.norms[0], EPS)
        q, k, v = self._heads(*pk.multi_lora_linear(y, linears[Q : V + 1]))
        (y,) = pk.multi_lora_linear(self._attention(*pk.rotary(q, k, cos, sin), v), [linears[O]])
        y, x = pk.add_rms_norm(y, x, self.norms[1], EPS)
        return x + pk.gated_mlp(y, *linears[GATE:])

    def _heads(self, *sides: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (-1, self.sizes.features)) for t in sides]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal, of (batch, rows, heads, features) to (batch, rows, features)."""
        sides = [t.transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*sides, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
