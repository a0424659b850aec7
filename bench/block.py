"""The decoder block that takes part: one of SmolLM2-135M, with adapters on all seven projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import PatchReport

from . import gate, layers

SEED = 11
"""Of torch's generator before every forward: it fixes the mask of a dropout."""


@dataclass(frozen=True)
class Sizes:
    """Those of a Llama configuration."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    def config(self, **options: Any) -> Any:
        """A transformers LlamaConfig."""
        import transformers

        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            rope_theta=100000.0,
            attn_implementation="sdpa",
            **options,
        )


SMOLLM2 = Sizes(hidden=576, intermediate=1536, heads=9, kv_heads=3)
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Variant:
    """What kind of adapter on what kind of base ("dense" or "nf4"), and whether it trains."""

    base: str = "dense"
    dora: bool = False
    dropout: float = 0.0
    adapters: int = 1
    """More than one: each sample of the batch goes through its own (PEFT's `adapter_names`)."""
    training: bool = True
    """Forward and backward; otherwise forward without grad, in evaluation mode."""

    @property
    def options(self) -> dict[str, Any]:
        """Of PEFT's LoraConfig."""
        return {"use_dora": self.dora, "lora_dropout": self.dropout}

    @property
    def names(self) -> list[str]:
        return [f"adapter{i}" for i in range(self.adapters)]


class Inputs(NamedTuple):
    """What a block is called with, and the gradient that comes back to it."""

    x: Tensor
    dy: Tensor
    position: tuple[Tensor, Tensor]

    def widen(self) -> Inputs:
        x, dy, cos, sin = map(testing.widen, (self.x.detach(), self.dy, *self.position))
        return Inputs(x.requires_grad_(), dy, (cos, sin))


class Model(NamedTuple):
    """A PEFT model whose base is the block. `report` is there when it is patched."""

    model: Any
    report: PatchReport | None

    def remark(self) -> str:
        """Which layers have not run fused, by reason."""
        entries = [] if self.report is None else self.report.layers
        reasons = Counter(
            reason for entry in entries for reason in {*entry.fallbacks, entry.reason} if reason
        )
        return "; ".join(f"original forward in {count} layers: {reason}" for reason, count in reasons.items())


class Blocks(layers.Kept):
    """The base weights of the block, quantised or not, and the models over them."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype

    @cached_property
    def config(self) -> Any:
        return self.sizes.config()

    @cached_property
    def originals(self) -> dict[str, Tensor]:
        """What was quantised, by the name of the projection."""
        shapes = {
            name: (layer.out_features, layer.in_features)
            for name, layer in self._empty().named_modules()
            if isinstance(layer, nn.Linear)
        }
        return {
            name: testing.tensor(*shape, dtype=self.dtype, seed=seed, scale=shape[1] ** -0.5)
            for seed, (name, shape) in enumerate(shapes.items())
        }

    @cached_property
    def packed(self) -> dict[str, pk.NF4Weight]:
        with pk.use_backend("reference"):
            return {name: pk.NF4Weight.quantize(weight) for name, weight in self.originals.items()}

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The dequantised weights in fp32."""
        return {name: layers.dequantized(weight) for name, weight in self.packed.items()}

    @property
    def nbytes(self) -> int:
        """Of the dense weights."""
        return sum(weight.nbytes for weight in self.originals.values())

    def inputs(self, batch: int, tokens: int) -> Inputs:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        shape = (batch, tokens, self.sizes.hidden)
        x, dy = (testing.tensor(*shape, dtype=self.dtype, seed=seed) for seed in (4, 5))
        cos, sin = LlamaRotaryEmbedding(self.config)(x, torch.arange(tokens)[None])
        return Inputs(x.requires_grad_(), dy, (cos, sin))

    def ours(self, variant: Variant) -> Model:
        model = self._adapted(variant, partial(self._base, variant.base))
        return Model(model, pk.patch(model))

    def stock(self, variant: Variant) -> Model:
        """PEFT alone: over dense weights, or over bitsandbytes' 4-bit layers."""
        base = "bnb" if variant.base == "nf4" else variant.base
        return Model(self._adapted(variant, partial(self._base, base)), None)

    def run(self, model: Model, variant: Variant, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """A call of the block in the way of the variant."""
        forward = self.forward(model, variant, inputs)
        if not variant.training:
            return layers.forward_call(forward, inputs.x)
        named = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        return layers.differentiated(partial(forward, inputs.x), {"dx": inputs.x, **named}, inputs.dy)

    def forward(self, model: Model, variant: Variant, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        """The block as a function of x."""
        arguments: dict[str, Any] = {"position_embeddings": inputs.position}
        if variant.adapters > 1:
            count = inputs.x.shape[0]
            arguments["adapter_names"] = [variant.names[i % variant.adapters] for i in range(count)]

        def forward(x: Tensor) -> Tensor:
            torch.default_generator.manual_seed(SEED)
            y: Tensor = model.model(x, **arguments)
            return y

        return forward

    def expected(self, variant: Variant, inputs: Inputs) -> tuple[gate.Expected, gate.Expected]:
        """What ours, and what PEFT's, are held against.

        The truth is PEFT in fp64. Under dropout the masks of the two differ: there the truth for ours is the
        patched block on the reference in fp64, which draws as ours does.
        """
        theirs = self._expected(variant, inputs, patch=False)
        if not variant.dropout:
            return theirs, theirs
        still = self._truth(replace(variant, dropout=0.0), inputs, patch=False)
        usual = {name: testing.relative_error(tensor, still[name]) for name, tensor in theirs.truth.items()}
        with pk.use_backend("reference"):
            ours = self._expected(variant, inputs, patch=True)
        return gate.Dropout(ours.plain, ours.truth, still, usual), theirs

    def _expected(self, variant: Variant, inputs: Inputs, patch: bool) -> gate.Expected:
        model = self._adapted(variant, partial(self._base, "dense"))
        if patch:
            pk.patch(model)
        plain = self.run(Model(model, None), variant, inputs)()
        return gate.Expected(plain, self._truth(variant, inputs, patch))

    def _truth(self, variant: Variant, inputs: Inputs, patch: bool) -> dict[str, Tensor]:
        def base(name: str) -> nn.Module:
            weight = self.exact[name]
            return layers.dense_linear((weight if variant.base == "nf4" else weight.to(self.dtype)).double())

        model = self._adapted(variant, base, wide=True)
        if patch:
            pk.patch(model)
        return self.run(Model(model, None), variant, inputs.widen())()

    def _adapted(self, variant: Variant, base: Callable[[str], nn.Module], wide: bool = False) -> Any:
        """The PEFT model over a block whose projections `base` makes; in fp64 when it is `wide`."""
        block = self._empty()
        for name in self.originals:
            _put(block, name, base(name))
        for seed, name in enumerate(NORMS):
            weight = (1 + testing.tensor(self.sizes.hidden, seed=seed, scale=0.1)).to(self.dtype)
            _put(block, f"{name}.weight", nn.Parameter(weight.double() if wide else weight))
        targets = [name.rpartition(".")[2] for name in self.originals]
        model = layers.adapted(block, targets, len(targets), variant.names, **variant.options)
        for name, layer in layers.lora_layers(model).items():
            self._fill(name.removeprefix("base_model.model."), layer, variant, wide)
        return model.train(variant.training)

    def _fill(self, name: str, layer: Any, variant: Variant, wide: bool) -> None:
        """The same numbers for every model: a delta of half the size of the base product."""
        weight, place = self.exact[name], list(self.originals).index(name)
        (out_features, in_features), rank = weight.shape, layers.RANK
        for number, adapter in enumerate(variant.names):
            seed = 100 + len(self.originals) * number + place
            a = testing.tensor(rank, in_features, seed=seed, scale=in_features**-0.5)
            scale = 0.5 * rank**-0.5 / layers.SCALING
            parameters = {
                layer.lora_A[adapter]: a,
                layer.lora_B[adapter]: testing.tensor(out_features, rank, seed=seed, scale=scale),
            }
            if variant.dora:
                change = 1 + testing.tensor(out_features, seed=seed, scale=0.1)
                parameters[layer.lora_magnitude_vector[adapter]] = weight.norm(dim=1) * change
            for module, values in parameters.items():
                module.weight = nn.Parameter(values.double() if wide else values, module.weight.requires_grad)

    def _base(self, kind: str, name: str) -> nn.Module:
        if kind == "nf4":
            return pk.nn.NF4Linear(self.packed[name].clone())
        if kind == "bnb":
            linear4bit: nn.Module = layers.linear4bit(self.originals[name])
            return linear4bit
        return layers.dense_linear(self.exact[name].to(self.dtype, copy=True))

    def _empty(self) -> nn.Module:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        with torch.device("meta"):
            block: nn.Module = LlamaDecoderLayer(self.config, 0)
        return block


def _put(block: nn.Module, name: str, value: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, value)
