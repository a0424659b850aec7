"""Inputs of the formulas in `memory`: sizes of a model, and settings of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

METHODS = ("lora", "qlora", "dora", "adapter", "prefix", "full")
OPTIMISERS = (
    "adamw", "paged_adamw", "adam8bit", "adamw8bit", "paged_adamw8bit", "lion8bit", "sgd", "adafactor",
)  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """The weight of a linear layer, or one weight of many experts, (experts, out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    adapted: bool = False
    """Whether it has a LoRA or DoRA adapter."""
    quantised: bool = False
    """Whether QLoRA packs it; experts only if the run packs experts."""
    packed: int | None = None
    """Its bytes in a packed checkpoint; None if QLoRA packs it."""
    experts: int = 1

    @property
    def numel(self) -> int:
        return self.experts * self.out_features * self.in_features


@dataclass(frozen=True)
class Block:
    """The sizes of a Llama-like decoder layer."""

    hidden: int
    intermediate: int
    q: int
    kv: int
    heads: int
    kv_heads: int
    qk_norm: bool
    adapted: Mapping[str, int]
    """Output features of the projections and experts' weights with an adapter."""
    experts: int = 0
    """Experts instead of an MLP."""
    top_k: int = 0


@dataclass(frozen=True)
class Model:
    """Sizes of a model, see `architecture.describe`."""

    linears: tuple[Weight, ...]
    parameters: tuple[tuple[int, ...], ...]
    """Shapes of all parameters, tied ones once."""
    itemsize: int
    vocabulary: int
    layers: int
    block: Block | None
    """None if the activations of the architecture are unknown."""
    experts: tuple[Weight, ...] = ()

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.parameters))


@dataclass(frozen=True)
class Run:
    """Settings of a fine-tuning run."""

    method: str
    batch: int = 1
    seq: int = 2048
    rank: int = 16
    optim: str = "adamw"
    reduction: int = 16
    """Bottleneck adapters have hidden / reduction features."""
    virtual_tokens: int = 20
    """For prefix tuning."""
    format: str = "nf4"
    """Of the weights that QLoRA packs."""
    blocksize: int | None = None
    double_quant: bool = True
    prepared: bool = False
    """QLoRA after PEFT's prepare_model_for_kbit_training: unquantised weights and activations are fp32."""
    experts: bool = False
    """QLoRA packs experts too."""

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def is_lora(self) -> bool:
        return self.method in ("lora", "qlora", "dora")

    @property
    def packs_experts(self) -> bool:
        return self.method == "qlora" and self.experts
