"""Tiny packed mixtures of experts: in the files each expert has layers, which transformers merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoint_damage import change_json, write
from owned_folders import FILE, NVFP4, dense_weight, nvfp4_config, nvfp4_parts
from packed_models import KINDS, Made, Weight, config_of, fp8
from safetensors.torch import load_file
from torch import Tensor
from transformers_models import read, transformers

import peft_kernels as pk

SIZES = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
SIZES |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def qwen(**options: Any) -> Any:
    sizes = {"num_hidden_layers": 1, "num_experts": 4, "head_dim": 32}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | sizes | options))


def deepseek(**options: Any) -> Any:
    """With a dense first layer, shared experts, and attention of low rank, in layers of odd sizes."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4}
    sizes |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
    sizes |= {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 32}
    sizes |= {"qk_nope_head_dim": 32, "v_head_dim": 32}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES | sizes | options))


def mixtral(**options: Any) -> Any:
    """Its files have other names, w1, w2 and w3, in a module of another name."""
    sizes = {name: size for name, size in SIZES.items() if name != "moe_intermediate_size"}
    sizes |= {"num_hidden_layers": 1, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes | options))


MODELS = {"qwen": qwen, "deepseek": deepseek, "mixtral": mixtral}
DTYPES = {"qwen": torch.bfloat16, "deepseek": torch.float32, "mixtral": torch.float32}
"""Of scales, as their owners publish them."""
EXPERTS = {
    "qwen": "model.layers.0.mlp.experts",
    "deepseek": "model.layers.1.mlp.experts",
    "mixtral": "model.layers.0.mlp.experts",
}
"""Names of experts in the model."""
PROJECTIONS = {
    "qwen": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    "deepseek": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    "mixtral": (
        "block_sparse_moe.experts.{}.w1",
        "block_sparse_moe.experts.{}.w3",
        "block_sparse_moe.experts.{}.w2",
    ),
}
"""An expert's layers in the file: gate, up and down."""


FORMS = ("gptq", "gptq v2", "gptq symmetric", "awq", "packed", "packed zeros", "packed mxfp4")
FORMS += tuple(f"nvfp4 of {owner}" for owner in NVFP4)
"""Formats with two codes in a byte."""


def make_moe(folder: Path, kind: str, form: str = "", **options: Any) -> Made:
    """Writes a model with random weights, its linear layers in FP8 except for routers and the head. `form`
    names another format: one of `KINDS` or `FORMS`."""
    torch.manual_seed(0)
    MODELS[kind](**options).to(torch.bfloat16).save_pretrained(folder)
    made = Made({}, {})
    for name, value in load_file(folder / FILE).items():
        if not name.endswith(
            ("proj.weight", "w1.weight", "w2.weight", "w3.weight", "a_proj_with_mqa.weight")
        ):
            # Biases of routers stay in fp32, in files and in transformers.
            made.tensors[name] = value.float() if name.endswith("correction_bias") else value
            continue
        parts, made.dense[name] = pack(form, *value.shape) if form else fp8(*value.shape, dtype=DTYPES[kind])
        stem = name.removesuffix("weight")
        made.tensors |= {stem + part: tensor for part, tensor in parts.items()}
    write(folder / FILE, made.tensors)
    change_json(folder / "config.json", quantization_config=stored_config(form or "fp8"))
    return made


def pack(form: str, out: int, into: int) -> Weight:
    """A random weight."""
    if form in KINDS:
        return KINDS[form].pack(out, into)
    parts = nvfp4_parts(out, into, form.removeprefix("nvfp4 of "), True)
    return parts, dense_weight(parts, "weight")


def stored_config(form: str) -> Any:
    """The `quantization_config` of a format."""
    return config_of(form) if form in KINDS else nvfp4_config(form.removeprefix("nvfp4 of "), True)


def dense_experts(folder: Path, made: Made, twin: Path) -> Path:
    """Writes the dense model of a packed one, in fp32."""
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    stems = tuple(name.removesuffix("weight") for name in made.dense)
    plain = {name: tensor.float() for name, tensor in made.tensors.items() if not name.startswith(stems)}
    write(twin / FILE, plain | made.dense)
    return twin


def in_file(kind: str, expert: int, layer: int) -> str:
    """The name of one of an expert's layers in the file, without the part."""
    start = EXPERTS[kind].removesuffix("mlp.experts")
    return start + PROJECTIONS[kind][layer].format(expert)


def weights_of(made: Made, kind: str, count: int = 4) -> dict[str, Tensor]:
    """The dense weights of the experts, as the model has them."""
    gate, up, down = (
        torch.stack([made.dense[f"{in_file(kind, e, layer)}.weight"] for e in range(count)])
        for layer in range(3)
    )
    name = EXPERTS[kind]
    return {f"{name}.gate_up_proj": torch.cat((gate, up), 1), f"{name}.down_proj": down}


def check_dequantize(folder: Path, made: Made, kind: str) -> None:
    """`dequantize` makes a dense model of the folder's values, in bf16."""
    model = read(folder)
    model.dequantize()
    assert not any(isinstance(p, pk.NF4Weight) for p in model.parameters())
    for name, dense in weights_of(made, kind).items():
        assert torch.equal(model.get_parameter(name), dense.bfloat16())
