"""Tiny transformers models for bottleneck adapters, their insertion points, and adapters in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.adapters.manage import sites

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _SIZES | {"vocab_size": 100, "max_position_embeddings": 40, "pad_token_id": 0}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def ids(seed: int = 1) -> Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(seed))


def text(seed: int = 1) -> dict[str, Tensor]:
    return {"input_ids": ids(seed)}


def pairs(seed: int = 1) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 1)[:, :5]}


def pictures(seed: int = 1) -> dict[str, Tensor]:
    return {"pixel_values": testing.tensor(2, 3, 16, 16, seed=seed)}


@dataclass
class Family:
    model: str
    sizes: dict[str, Any]
    inputs: Callable[..., dict[str, Tensor]]
    layers: list[str]
    attention: tuple[str, str]
    """The first and last linear layers of the attention."""
    feed_forward: tuple[str, str]
    decoder_feed_forward: tuple[str, str] | None = None

    def places(self, kind: str) -> list[tuple[str, str]]:
        if kind == "attention":
            return [(f"{at}.{self.attention[0]}", f"{at}.{self.attention[1]}") for at in self.layers]
        found = []
        for at in self.layers:
            of_decoder = self.decoder_feed_forward if "decoder" in at else None
            first, last = of_decoder or self.feed_forward
            found.append((f"{at}.{first}", f"{at}.{last}"))
        return found

    def make(self, base: str = "dense", **options: Any) -> Any:
        torch.manual_seed(0)
        name = self.model
        config = getattr(transformers, name.partition("For")[0].removesuffix("LMHeadModel") + "Config")
        model = getattr(transformers, name)(config(**self.sizes | options)).eval()
        with torch.no_grad():  # so that losses of different forwards differ
            for seed, parameter in enumerate(model.parameters()):
                parameter.add_(testing.tensor(*parameter.shape, seed=seed, scale=0.05))
        if base == "nf4":
            pk.quantize_model(model)
        return model


_BERT = ("attention.self.query", "attention.output.dense"), ("intermediate.dense", "output.dense")
_T5_SIZES = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 100}
_BART_SIZES = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 40,
}  # fmt: skip
FAMILIES = {
    "bert": Family(
        "BertForSequenceClassification", _TEXT, text, ["bert.encoder.layer.0", "bert.encoder.layer.1"], *_BERT
    ),
    "roberta": Family(
        "RobertaForMaskedLM", _TEXT, text, ["roberta.encoder.layer.0", "roberta.encoder.layer.1"], *_BERT
    ),
    "vit": Family(
        "ViTForImageClassification", _SIZES | {"image_size": 16, "patch_size": 8}, pictures,
        ["vit.layers.0", "vit.layers.1"], ("attention.q_proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc2"),
    ),
    "t5": Family(
        "T5ForConditionalGeneration", _T5_SIZES | _SPECIAL, pairs,
        [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in range(2)],
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
        ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
    ),
    "bart": Family(
        "BartForConditionalGeneration", _BART_SIZES | _SPECIAL, pairs,
        ["model.encoder.layers.0", "model.decoder.layers.0"],
        ("self_attn.q_proj", "self_attn.out_proj"), ("fc1", "fc2"),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 40} | _SPECIAL, text,
        ["transformer.h.0", "transformer.h.1"], ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"),
    ),
    "llama": Family(
        "LlamaForCausalLM", _TEXT | {"num_key_value_heads": 2}, text, ["model.layers.0", "model.layers.1"],
        ("self_attn.q_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"),
    ),
    "phi3": Family(  # registers the last layer of its attention first
        "Phi3ForCausalLM", _TEXT | {"num_key_value_heads": 2}, text, ["model.layers.0", "model.layers.1"],
        ("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj"),
    ),
}  # fmt: skip


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


def stir(model: nn.Module, name: str, seed: int = 0) -> None:
    """Sets an adapter's parameters so that it has an effect."""
    found = [site.adapters[name] for site in sites(model) if name in site.adapters]
    assert found
    with torch.no_grad():
        for i, parameter in enumerate(p for adapter in found for p in adapter.parameters()):
            parameter.copy_(testing.tensor(*parameter.shape, seed=seed + i, scale=0.2))


class ReferenceLinear(nn.Module):
    """A linear layer followed by adapters, in plain torch."""

    def __init__(self, linear: nn.Module, adapters: list[Any], taken: list[Tensor]) -> None:
        super().__init__()
        self.linear, self.adapters, self.taken = linear, adapters, taken

    @property
    def weight(self) -> Any:
        return self.linear.weight  # T5 asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for a in self.adapters:
            into = self.taken[-1] if a.config.parallel else y
            if a.norm_weight is not None:
                into = F.layer_norm(into, into.shape[-1:], a.norm_weight, a.norm_bias)
            function = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[a.config.activation]
            hidden = function(F.linear(into, a.down, a.down_bias))
            y = y + a.config.scaling * F.linear(hidden, a.up, a.up_bias)
        return y


def add_reference_adapters(
    family: Family, bare: nn.Module, adapted: nn.Module, names: list[str], prefix: str = ""
) -> Any:
    """Adds the adapters of `adapted` to `bare`, in place, in plain torch, where this family has them."""
    held = {site.place.last: site for site in sites(adapted)}
    for kind in ("attention", "feed_forward"):
        for first, last in family.places(kind):
            site = next((s for at, s in held.items() if last == at or last.endswith("." + at)), None)
            mine = [] if site is None else [site.adapters[n] for n in names if n in site.adapters]
            taken: list[Tensor] = []
            begin, end = bare.get_submodule(prefix + first), bare.get_submodule(prefix + last)
            begin.register_forward_pre_hook(lambda _, args, taken=taken: taken.append(args[0]))
            bare.set_submodule(prefix + last, ReferenceLinear(end, mine, taken))
    return bare
