"""Inputs of the formulas in `memory`: sizes of a model, and settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("lora", "qlora", "dora", "adapter", "prefix", "full")
OPTIMISERS = (
    "adamw", "paged_adamw", "adam8bit", "adamw8bit", "paged_adamw8bit", "lion8bit", "sgd", "adafactor",
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A linear layer: its name inside a block, or in the model."""

    name: str
    out_features: int
    in_features: int
    quantised: bool = False
    """Whether QLoRA packs it."""
    adapted: bool = False
    """Whether it has a LoRA or DoRA adapter."""
    packed: int | None = None
    """Bytes of its weight as a folder has it packed; None if QLoRA packs it."""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Experts:
    """One weight of many experts, (experts, out_features, in_features)."""

    name: str
    count: int
    out_features: int
    in_features: int
    adapted: bool = False
    """Whether it has a LoRA adapter."""
    quantised: bool = True
    """Whether QLoRA with packed experts packs it."""
    packed: int | None = None
    """As of `Linear`, for all experts."""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Mixture:
    """The experts of a decoder layer instead of an MLP."""

    count: int
    top_k: int
    adapted: frozenset[str]
    """Those of gate_up_proj and down_proj with an adapter."""


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
    adapted: frozenset[str]
    """Projections with an adapter."""
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Model:
    """Sizes of a model, see `architecture.describe`."""

    linears: tuple[Linear, ...]
    parameters: tuple[tuple[int, ...], ...]
    """Shapes of all parameters, tied ones once."""
    itemsize: int
    vocabulary: int
    layers: int
    block: Block | None
    """None if the activations of the architecture are unknown."""
    experts: tuple[Experts, ...] = ()


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
    """QLoRA with packed experts."""

    @property
    def tokens(self) -> int:
        return self.batch * self.seq
