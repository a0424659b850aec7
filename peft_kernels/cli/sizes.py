"""What the formulas of `memory` need to know: a model's sizes, and what is asked for."""

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
    """Whether LoRA and DoRA put an adapter on it."""

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
    """Whether LoRA puts an adapter on it."""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Mixture:
    """The experts of a decoder layer, in place of an MLP."""

    count: int
    top_k: int
    adapted: frozenset[str]
    """Of gate_up_proj and down_proj."""


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
    """Of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: those with an adapter."""
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Model:
    """A model as the formulas need it, see `architecture.describe`."""

    linears: tuple[Linear, ...]
    parameters: tuple[tuple[int, ...], ...]
    """Shapes of all parameters, tied ones once."""
    itemsize: int
    vocabulary: int
    layers: int
    block: Block | None
    """None for an architecture whose activations are not known here."""
    experts: tuple[Experts, ...] = ()


@dataclass(frozen=True)
class Run:
    """What is asked for."""

    method: str
    batch: int = 1
    seq: int = 2048
    rank: int = 16
    optim: str = "adamw"
    reduction: int = 16
    """Of bottleneck adapters: hidden / reduction is their width."""
    virtual_tokens: int = 20
    """Of prefix tuning."""
    blocksize: int = 64
    double_quant: bool = True
    prepared: bool = False
    """QLoRA after PEFT's prepare_model_for_kbit_training: what is not quantised is fp32, activations too."""
    experts: bool = False
    """QLoRA with experts packed too."""

    @property
    def tokens(self) -> int:
        return self.batch * self.seq
