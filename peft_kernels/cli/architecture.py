"""Sizes of a model from its configuration, which transformers builds on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.architecture import ADAPTER, of_an_adapter
from ..checkpoints.folder import CONFIG
from ..checkpoints.header import CheckpointError
from ..nf4.experts_forward import weight_names
from ..quantize.targets import choose_experts, choose_layers
from .sizes import Block, Model, Weight

CHECKED = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""Model types whose activations are tested against measurements."""
MIXTURES = ("mixtral", "qwen3_moe")
"""Model types whose layers are Llama's with experts instead of the MLP."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PIECES = {("self_attn", name) for name in PROJECTIONS[:4]} | {("mlp", name) for name in PROJECTIONS[4:]}


def build(path: Path) -> Any:
    """The model of a folder or config.json, on the meta device. Raises CheckpointError if it cannot be
    built."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("transformers is not installed: pip install 'peft_kernels[hf]'") from None
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG if path.is_dir() else path).is_file():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder}: {of_an_adapter(folder)}")
        # transformers would ask a hub for it.
        raise CheckpointError(f"{path}: expected a folder with {CONFIG}, or such a file, got none")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)  # build the dense model
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers may raise anything for an unknown configuration
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: expected the configuration of a language model ({reason})") from error


def describe(
    model: Any,
    dtype: torch.dtype | None = None,
    targets: Sequence[str] | None = None,
    target_parameters: Sequence[str] = (),
    packed: Mapping[str, int] | None = None,
    linears_packed: bool = True,
) -> Model:
    """The sizes of a model.

    Parameters
    ----------
    model : PreTrainedModel
        On any device.
    dtype : torch.dtype, optional
        Dtype of the weights; by default the configuration's, else bfloat16.
    targets : names, optional
        Last parts of the names of layers that get adapters; by default all linear layers but the head.
    target_parameters : names
        Last parts of the names of weights of experts that get adapters, as PEFT's.
    packed : dict, optional
        Bytes of the packed weights of a folder, by name; by default QLoRA packs those that it can.
    linears_packed : bool
        Whether QLoRA packs linear layers, if `packed` does not tell.
    """
    chosen = choose_layers(model)[0] if linears_packed else {}
    quantised = {f"{name}.weight" for name in chosen} if packed is None else packed.keys()
    known = packed or {}
    head = model.get_output_embeddings()
    linears = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        shape = tuple(module.weight.shape)
        out, into = shape if isinstance(module, nn.Linear) else shape[::-1]
        last = name.rpartition(".")[2]
        adapted = module is not head if targets is None else last in targets
        weight = f"{name}.weight"
        linears.append(Weight(name, out, into, adapted, weight in quantised, known.get(weight)))
    if targets is not None:
        missing = sorted(set(targets) - {linear.name.rpartition(".")[2] for linear in linears})
        if missing:
            raise CheckpointError(f"target-modules: expected names of linear layers, got {missing[0]!r}")
    experts = _experts(model, target_parameters, packed)
    dtype = dtype or getattr(model.config, "dtype", None) or torch.bfloat16
    config = model.config.get_text_config()
    return Model(
        tuple(linears),
        tuple(tuple(parameter.shape) for parameter in model.parameters()),
        dtype.itemsize,
        config.vocab_size,
        config.num_hidden_layers,
        _block(model, config, linears, experts),
        tuple(experts),
    )


def _experts(model: Any, target_parameters: Sequence[str], packed: Mapping[str, int] | None) -> list[Weight]:
    found, known = [], set[str]()
    for module_name, module in choose_experts(model)[0].items():
        for key in weight_names(module):
            count, out, into = module._parameters[key].shape
            out, into = (into, out) if module.is_transposed else (out, into)
            name = f"{module_name}.{key}"
            fitting = {target for target in target_parameters if f".{name}".endswith(f".{target}")}
            known |= fitting
            nbytes = None if packed is None else packed.get(name)
            quantised = packed is None or nbytes is not None
            found.append(Weight(name, out, into, bool(fitting), quantised, nbytes, count))
    missing = sorted(set(target_parameters) - known)
    if missing:
        raise CheckpointError(f"target-parameters: expected names of weights of experts, got {missing[0]!r}")
    return found


def _block(model: Any, config: Any, linears: list[Weight], experts: list[Weight]) -> Block | None:
    """The decoder layer, if all are equal and have exactly the parts of Llama's."""
    by_layer: dict[str, dict[str, Weight]] = {}
    for linear in linears:
        match = re.fullmatch(r".*\.layers\.(\d+)\.(\w+)\.(\w+)", linear.name)
        if match and (match[2], match[3]) in _PIECES:
            by_layer.setdefault(match[1], {})[match[3]] = linear
        elif ".layers." in linear.name:
            return None
    sizes = {tuple((n, x.out_features, x.in_features, x.adapted) for n, x in sorted(parts.items()))
             for parts in by_layer.values()}  # fmt: skip
    if len(sizes) != 1 or len(by_layer) != config.num_hidden_layers:
        return None
    parts = next(iter(by_layer.values()))
    of_experts: dict[str, Weight] = {}
    if model.config.model_type in MIXTURES and set(parts) == set(PROJECTIONS[:4]):
        of_experts = _equal_experts(config, experts)
        if not of_experts:
            return None
        intermediate = of_experts["down_proj"].in_features
    elif set(parts) == set(PROJECTIONS):
        intermediate = parts["gate_proj"].out_features
    else:
        return None
    norms = {name.rpartition(".")[2] for name, _ in model.named_modules() if ".layers.0." in name}
    return Block(
        hidden=parts["q_proj"].in_features,
        intermediate=intermediate,
        q=parts["q_proj"].out_features,
        kv=parts["k_proj"].out_features,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        qk_norm="q_norm" in norms,
        adapted={name: each.out_features for name, each in (parts | of_experts).items() if each.adapted},
        experts=of_experts["down_proj"].experts if of_experts else 0,
        top_k=config.num_experts_per_tok if of_experts else 0,
    )


def _equal_experts(config: Any, experts: list[Weight]) -> dict[str, Weight]:
    """The experts of a layer, by the last part of their names; none unless equal in all layers."""
    sizes = {
        (e.name.rpartition(".")[2], e.experts, e.out_features, e.in_features, e.adapted) for e in experts
    }
    if len(sizes) != 2 or len(experts) != 2 * config.num_hidden_layers:
        return {}
    return {each.name.rpartition(".")[2]: each for each in experts}
