"""Mixtures of experts of transformers for tests: modules of experts, and tiny models."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import testing
from peft_kernels.nf4.experts_packing import pack, unpack

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="transformers is older than 5")

EXPERTS, HIDDEN, INNER, TOP_K = 6, 64, 96, 3
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeConfig", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "mixtral": ("Mixtral", "MixtralConfig", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "gpt_oss": ("GptOss", "GptOssConfig", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "aria": ("Aria", "AriaTextConfig", {"moe_num_experts": EXPERTS, "intermediate_size": INNER}),
    "nemotron_h": (
        "NemotronH",
        "NemotronHConfig",
        {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER},
    ),
    "muse_spark": (
        "MuseSpark",
        "MuseSparkTextConfig",
        {
            "num_local_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "moe_hidden_size": HIDDEN,
            "num_attention_heads": 4,
        },
    ),
}
KINDS = tuple(_KINDS)
"""Plain, twice; transposed, with biases and a gate of its own; transposed; no gate; followed by a norm."""


def experts(kind: str, dtype: torch.dtype = torch.float32, implementation: str = "eager") -> Any:
    name, config_name, sizes = _KINDS[kind]
    home = pytest.importorskip(f"transformers.models.{kind}", reason=f"this transformers has no {kind}")
    config = getattr(home, config_name)(hidden_size=HIDDEN, **sizes)
    config._experts_implementation = implementation
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    module: nn.Module = getattr(modeling, f"{name}Experts")(config)
    for seed, parameter in enumerate(module.parameters()):
        if parameter.dim() > 1:  # norms are initialised already
            parameter.data = testing.tensor(*parameter.shape, seed=seed, scale=0.2)
    return module.to(dtype).requires_grad_(False)


def sample(rows: int = 19, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and routing weights. The last expert gets no token."""
    order = testing.tensor(rows, EXPERTS - 1, seed=3).argsort(dim=1)[:, :TOP_K]
    return testing.tensor(rows, HIDDEN, dtype=dtype), order, testing.tensor(rows, TOP_K, seed=4).softmax(-1)


def packed(kind: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    module = experts(kind, dtype)
    if not {"gate_up_proj", "up_proj"} & module._parameters.keys():
        pytest.skip(f"the experts of {kind} are no parameters in this transformers")
    pack(module, **options)
    return module


def unpacked(module: Any, dtype: torch.dtype | None = None, implementation: str = "eager") -> Any:
    """The same experts in transformers' implementation."""
    dense = copy.deepcopy(module)
    unpack(dense)
    dense.config = copy.copy(dense.config)
    dense.config._experts_implementation = implementation
    return dense if dtype is None else dense.to(dtype)


SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _qwen3_moe() -> Any:
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "head_dim": 16}
    return transformers.Qwen3MoeConfig(**SIZES, **sizes, num_experts_per_tok=2)


def _mixtral() -> Any:
    return transformers.MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=4)


def _gpt_oss() -> Any:
    sizes = {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    return transformers.GptOssConfig(**SIZES, **sizes)


def _deepseek_v3() -> Any:
    """The first layer has no experts, the others also have shared ones."""
    experts = {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    heads = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    sizes = SIZES | {"num_key_value_heads": 4, "intermediate_size": 128, "v_head_dim": 16}
    return transformers.DeepseekV3Config(**sizes, **experts, **heads, topk_group=1, first_k_dense_replace=1)


def _granitemoe() -> Any:
    sizes = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GraniteMoeConfig(**SIZES, **sizes)


def _olmoe() -> Any:
    return transformers.OlmoeConfig(**SIZES, intermediate_size=64, num_experts=4, num_experts_per_tok=2)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "granitemoe": _granitemoe,
    "olmoe": _olmoe,
}


def model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A language model with random weights, in fp32 because a 16-bit rounding can route a token to other
    experts."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).to(dtype)


def qwen_moe() -> Any:
    """Its experts are one parameter in the model and many tensors in the file."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **sizes, **heads, moe_intermediate_size=64, shared_expert_intermediate_size=64
        )
    )
