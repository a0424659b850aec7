"""Models over bases of each kind, with adapters on all projections, all with the same values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import PatchReport

from . import layers


@dataclass(frozen=True)
class Sizes:
    """Of a Llama configuration."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    def config(self, **options: Any) -> Any:
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


@dataclass(frozen=True)
class Variant:
    """The kind of adapter and of base ("dense" or "nf4"), and whether it trains."""

    base: str = "dense"
    dora: bool = False
    dropout: float = 0.0
    adapters: int = 1
    """If several, each sample of the batch uses its own (PEFT's `adapter_names`)."""
    training: bool = True
    """Forward and backward; otherwise forward without grad, in evaluation mode."""

    @property
    def options(self) -> dict[str, Any]:
        """Of PEFT's LoraConfig."""
        return {"use_dora": self.dora, "lora_dropout": self.dropout}

    @property
    def names(self) -> list[str]:
        return [f"adapter{i}" for i in range(self.adapters)]


class Model(NamedTuple):
    """A PEFT model, with a report if it is patched."""

    model: Any
    report: PatchReport | None = None

    def remark(self) -> str:
        """The number of layers that did not run fused, by reason."""
        entries = [] if self.report is None else self.report.layers
        reasons = Counter(
            reason for entry in entries for reason in {*entry.fallbacks, entry.reason} if reason
        )
        return "; ".join(f"original forward in {count} layers: {reason}" for reason, count in reasons.items())


class Adapted(layers.LayerCache):
    """Base weights of one dtype and the models over them."""

    delta = 0.5
    """Size of the adapters' output relative to the base layer's."""
    config: Any

    def __init__(self, sizes: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype

    def plain(self) -> Any:
        """The model with dense projections, without adapters."""
        raise NotImplementedError

    @cached_property
    def originals(self) -> dict[str, Tensor]:
        """The weights before quantisation, by name of the projection."""
        modules = self.plain().named_modules()
        linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and name != "lm_head"}
        return {name: linear.weight.detach() for name, linear in linears.items()}

    @cached_property
    def packed(self) -> dict[str, pk.NF4Weight]:
        with pk.use_backend("reference"):
            return {name: pk.NF4Weight.quantize(weight) for name, weight in self.originals.items()}

    def free_weights(self) -> None:
        """Frees the weights that models are made from; the next model makes them again."""
        for name in ("originals", "packed"):
            vars(self).pop(name, None)

    def over(self, base: str) -> Any:
        """The model on NF4 weights ("nf4"), bitsandbytes' ("bnb"), or dequantised ones: in fp32 ("exact"), or
        in the dtype of the case ("dense")."""
        model = self.plain()
        for name in self.originals:
            model.set_submodule(name, self.layer(base, name))
        model.is_loaded_in_4bit = base == "bnb"
        return model

    def layer(self, base: str, name: str) -> nn.Module:
        if base == "nf4":
            return pk.nn.NF4Linear(self.packed[name].clone())
        if base == "bnb":
            linear4bit: nn.Module = layers.linear4bit(self.originals[name])
            return linear4bit
        exact = layers.dequantized(self.packed[name])
        return layers.dense_linear(exact if base == "exact" else exact.to(self.dtype))

    def adapt(self, model: Any, variant: Variant, wide: bool = False) -> Any:
        """Adds the same adapters to any model; in fp64 if `wide`."""
        model = model.double() if wide else model
        targets = sorted({name.rpartition(".")[2] for name in self.originals})
        adapted = layers.adapted(model, targets, len(self.originals), variant.names, **variant.options)
        for name, layer in layers.lora_layers(adapted).items():
            self._fill(name.removeprefix("base_model.model."), layer, variant)
        return (adapted.double() if wide else adapted).train(variant.training)

    def _fill(self, name: str, layer: Any, variant: Variant) -> None:
        place, rank = list(self.originals).index(name), layers.RANK
        out_features, in_features = self.originals[name].shape
        for number, adapter in enumerate(variant.names):
            seed = 100 + len(self.originals) * number + place
            scale = self.delta * rank**-0.5 / layers.SCALING
            values = {
                layer.lora_A[adapter]: testing.tensor(rank, in_features, seed=seed, scale=in_features**-0.5),
                layer.lora_B[adapter]: testing.tensor(out_features, rank, seed=seed, scale=scale),
            }
            if variant.dora:
                change = 1 + testing.tensor(out_features, seed=seed, scale=0.1)
                norm = layers.dequantized(self.packed[name]).norm(dim=1)
                values[layer.lora_magnitude_vector[adapter]] = norm * change
            for module, value in values.items():
                module.weight = nn.Parameter(value, module.weight.requires_grad)

    def ours(self, variant: Variant = Variant(base="nf4")) -> Model:
        model = self.adapt(self.over(variant.base), variant)
        return Model(model, pk.patch(model))

    def stock(self, variant: Variant = Variant(base="nf4")) -> Model:
        """Unpatched PEFT over dense weights or bitsandbytes' 4-bit layers."""
        base = "bnb" if variant.base == "nf4" else variant.base
        return Model(self.adapt(self.over(base), variant))

    def reference(self, variant: Variant, wide: bool, patch: bool = False) -> Model:
        """PEFT over the dequantised weights, in fp64 or the dtype of the case."""
        model = self.adapt(self.over("exact" if wide and variant.base == "nf4" else "dense"), variant, wide)
        if patch:
            pk.patch(model)
        return Model(model)
