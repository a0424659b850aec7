"""Tiny checkpoints in the formats of other owners, written here without their libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoint_damage import change_json, write
from safetensors.torch import load_file
from torch import Tensor
from transformers_models import ids, llama, transformers

import peft_kernels as pk

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4 = ("compressed-tensors", "modelopt")
FILE = "model.safetensors"
_MXFP4 = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}
_WEIGHTS = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "dynamic": False}
_CONFIGS: dict[str, Any] = {
    "compressed-tensors": {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": _WEIGHTS | {"strategy": "tensor_group"}}
        },
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
    "modelopt": {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.37.0"},
        "quant_algo": "NVFP4",
        "quant_method": "modelopt",
    },
}


def nvfp4_config(owner: str, activations: bool = False) -> Any:
    """A new copy of its `quantization_config`."""
    config = json.loads(json.dumps(_CONFIGS[owner]))
    if activations:
        group = config["config_groups"]["group_0"]
        group["input_activations"] = group["weights"] | {"dynamic": "local"}
    return config


def gpt_oss(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Writes a GPT-OSS with random weights as its owner does, and returns the tensors."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GptOssConfig(**sizes | heads | experts | tokens | options)
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):  # they start as zeros
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    tensors = {}
    for name, value in load_file(folder / FILE).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = value
            continue
        count, into, out = value.shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (count, out, into // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 126, (count, out, into // 32), dtype=torch.uint8)
    return _written(folder, tensors, _MXFP4)


def nvfp4(folder: Path, owner: str, activations: bool = False, **options: Any) -> dict[str, Tensor]:
    """Writes a Llama with random weights as an owner of NVFP4 does, and returns the tensors."""
    llama(**options).to(torch.bfloat16).save_pretrained(folder)
    torch.manual_seed(0)
    tensors = {}
    for name, value in load_file(folder / FILE).items():
        if not name.endswith("proj.weight"):
            tensors[name] = value
            continue
        stem = name.removesuffix("weight")
        tensors |= {stem + part: each for part, each in nvfp4_parts(*value.shape, owner, activations).items()}
    return _written(folder, tensors, nvfp4_config(owner, activations))


def nvfp4_parts(out: int, into: int, owner: str, activations: bool = False) -> dict[str, Tensor]:
    """A random NVFP4 weight, by the last part of the tensors' names."""
    codes = torch.randint(0, 256, (out, into // 2), dtype=torch.uint8)
    scales = (torch.rand(out, into // 16) * 400).to(torch.float8_e4m3fn)
    whole = 0.0003 + 0.0002 * torch.rand(1)
    if owner == "modelopt":
        found = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole.reshape(())}
        return found | ({"input_scale": torch.rand(())} if activations else {})
    found = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": 1 / whole}
    return found | ({"input_global_scale": torch.rand(1)} if activations else {})


def _written(folder: Path, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    write(folder / FILE, tensors)
    change_json(folder / "config.json", quantization_config=config)
    return tensors


def values(codes: Tensor) -> Tensor:
    """The E2M1 values of bytes, the first code of two in the low nibble."""
    table = torch.tensor(E2M1)
    return torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), -1).flatten(-2)


def dense_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """An NVFP4 weight as its owner defines it, in fp32."""
    if f"{name}_packed" in tensors:
        codes, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"].float()
        scales = scales / tensors[f"{name}_global_scale"]
    else:
        codes, scales = tensors[name], tensors[f"{name}_scale"].float() * tensors[f"{name}_scale_2"]
    return values(codes) * scales.repeat_interleave(16, 1)


def dense_twin(folder: Path, tensors: dict[str, Tensor], twin: Path, dtype: torch.dtype) -> Path:
    """Writes the dense model of an NVFP4 checkpoint."""
    packed = {name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")}
    dense = {name: dense_weight(tensors, name).to(dtype) for name in packed}
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    plain = {n: t.to(dtype) for n, t in tensors.items() if n.endswith((".weight",)) and n not in packed}
    write(twin / FILE, plain | dense)
    return twin


def stored(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def assert_same_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bytes."""
    found = load_file(folder / FILE)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        bits = (each.contiguous().view(-1).view(torch.uint8) for each in (found[name], value))
        assert torch.equal(*bits), name


def with_adapters(model: Any, **config: Any) -> Any:
    """A PEFT model whose LoRA adapters are not zero."""
    import peft

    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters_of(tuned):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return tuned


def adapters_of(tuned: Any) -> list[Any]:
    return [parameter for name, parameter in tuned.named_parameters() if "lora_" in name]


def trained(
    model: Any, patch: bool = False, steps: int = 5, lr: float = 3e-3, **config: Any
) -> tuple[Any, list[float]]:
    """A model with trained adapters, on all linear layers unless `config` says otherwise, and its losses."""
    tuned = with_adapters(model, **{"target_modules": "all-linear"} | config)
    if patch:
        pk.patch(tuned)
    return tuned, losses_of(tuned, torch.optim.AdamW(adapters_of(tuned), lr=lr), steps)


def losses_of(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The losses of training steps on one batch."""
    tokens, losses = ids(4, 16), []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
