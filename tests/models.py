"""Small models that several test files share."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from installed import before
from torch import Tensor, nn

import peft_kernels as pk
import testing

BASES = ("dense", "nf4", "bnb")


class Net(nn.Module):
    """Two linear layers that take adapters (one with a bias), and a head that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 128)  # multiples of 64: bitsandbytes misreads others on CPU
        self.o = nn.Linear(128, 64, bias=False)
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.o(nn.functional.silu(self.q(x))))  # smooth: rounding flips no gate


def inputs(rows: int = 17, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """What a Net takes."""
    return testing.tensor(rows, 64, dtype=dtype, seed=seed)


def base_model(base: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A Net whose q and o are nn.Linear ("dense"), NF4Linear ("nf4") or bitsandbytes Linear4bit ("bnb")."""
    torch.manual_seed(seed)
    return to_base(Net().to(dtype), base)


def to_base(model: nn.Module, base: str, compute_dtype: torch.dtype | None = None) -> Any:
    """Every nn.Linear but the head converted, in place, as loading the model in 4 bits would."""
    if base == "nf4":
        pk.quantize_model(model)
    elif base == "bnb":
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                model.set_submodule(name, to_linear4bit(module, compute_dtype))
        model.is_loaded_in_4bit = True  # what from_pretrained sets: PEFT then takes its own Linear4bit
    return model


def to_linear4bit(
    linear: nn.Linear, compute_dtype: torch.dtype | None = None, quant_type: str = "nf4"
) -> Any:
    """The layer as bitsandbytes' Linear4bit, before 0.50 without double quantisation, which had another table
    on CPUs then. Skips without bitsandbytes."""
    import pytest

    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type=quant_type,
        compute_dtype=compute_dtype,
        compress_statistics=not before("bitsandbytes", "0.50"),
    )
    layer.load_state_dict(copy.deepcopy(linear.state_dict()))
    layer.to(linear.weight.dtype).to("cpu")
    layer.weight.requires_grad_(False)
    return layer


def tiny_llama(**overrides: Any) -> Any:
    """A Llama of two layers with random weights. Skips without transformers."""
    import pytest

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | tokens | overrides))


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved_and_loaded(value: Any, weights_only: bool = False) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)
