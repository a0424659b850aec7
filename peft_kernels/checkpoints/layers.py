"""Which weights of a model on disk become NF4, found without loading it.

From the architecture that config.json names, built on the meta device, where transformers knows it; else from
names and shapes. What is chosen is what bitsandbytes' loaders will expect to be 4-bit: they are told, in
`llm_int8_skip_modules`, of every linear layer that stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..code_tables import WEIGHT_DTYPES
from ..integrations.architectures import HEAD_NAMES
from ..targets import choose_layers
from .folder import Checkpoint
from .header import CheckpointError

_NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|(^|[._])ln[._\d]|position|relative|router|conv|(^|\.)gate$")
_SMALLEST = 64  # in both dimensions, of what is taken for a linear layer without its class


@dataclass
class Choice:
    quantise: dict[str, bool]
    """Names of weights in the checkpoint, and whether they are stored transposed, as (in, out)."""
    left: dict[str, str]
    """Why other weights of linear layers, or of experts, stay."""
    skip_modules: list[str]
    source: str
    """In words: how it is known which layers are linear."""


def choose(checkpoint: Checkpoint, skip: Iterable[str] = ()) -> Choice:
    """CheckpointError when a name in `skip` fits nothing, or nothing can be quantised."""
    try:
        model, why_not = _on_meta(checkpoint), ""
    except Exception as error:  # transformers raises anything on a configuration that it does not know
        model, why_not = None, " ".join(str(error).split())[:100] or type(error).__name__
    skip = tuple(skip)
    if model is None:
        choice = _by_names(checkpoint, skip, why_not)
    else:
        choice = _by_classes(checkpoint, model, skip)
    for name in list(choice.quantise):
        dtype = checkpoint.entries[name].dtype
        if dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{name}: expected float32, bfloat16 or float16, got {dtype}")
    if not choice.quantise:
        raise CheckpointError(f"{checkpoint.path}: expected linear layers to quantise, found none")
    return choice


def _on_meta(checkpoint: Checkpoint) -> Any:
    import transformers

    # The architecture itself, before Auto classes: a classifier has the same model_type.
    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    names = checkpoint.config.get("architectures") or [""]
    cls = getattr(transformers, names[0], None)
    with torch.device("meta"):
        if cls is None:
            return transformers.AutoModel.from_config(config)
        return cls._from_config(config)


def _by_classes(checkpoint: Checkpoint, model: Any, skip: tuple[str, ...]) -> Choice:
    try:
        chosen, left = choose_layers(model, skip)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for name, module in list(chosen.items()):
        if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
            del chosen[name]
            left[name] = f"a {type(module).__name__}, which bitsandbytes' loaders do not read in 4 bits"
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    skip_modules = sorted(set(linear) - chosen.keys())
    for name in [name for name in chosen if _skips(skip_modules, name)]:
        del chosen[name]
        left[name] = "its name ends like that of a layer that stays, and loaders go by that"
    module_of = _renaming(model)
    quantise, experts = {}, {}
    for name, entry in checkpoint.entries.items():
        target = module_of(name)
        if target in chosen and len(entry.shape) == 2:
            quantise[name] = type(chosen[target]).__name__ == "Conv1D"
        elif "experts" in name and len(entry.shape) in (2, 3):
            experts[name] = "weights of experts, which bitsandbytes' format does not have in 4 bits"
    if not quantise:
        raise CheckpointError(
            f"{checkpoint.path}: none of its tensors is a linear layer of {type(model).__name__}, "
            "the architecture that config.json names"
        )
    return Choice(quantise, left | experts, skip_modules, f"{type(model).__name__} of transformers")


def _skips(skip_modules: Iterable[str], name: str) -> bool:
    """Whether a loader of transformers leaves the module for one of these names."""
    return any(name == key or name.startswith(f"{key}.") or name.endswith(key) for key in skip_modules)


def _renaming(model: Any) -> Callable[[str], str | None]:
    """From a weight's name in the checkpoint to the module that transformers loads it into, if it loads the
    weight as it is."""
    prefix, there = model.base_model_prefix, {name: True for name, _ in model.named_parameters()}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        renamings, converters, rename = [], [], None
    else:
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        rename = rename_source_key

    def module_of(name: str) -> str | None:
        if not name.endswith(".weight"):
            return None
        fused = None
        if rename is not None:
            name, fused = rename(name, renamings, converters, prefix, there)
        elif f"{prefix}.{name}" in there:
            name = f"{prefix}.{name}"
        return None if fused is not None else name.removesuffix(".weight")

    return module_of


def _by_names(checkpoint: Checkpoint, skip: tuple[str, ...], why_not: str) -> Choice:
    """Weights of two dimensions inside numbered layers, that are not named as something else."""
    quantise: dict[str, bool] = {}
    left: dict[str, str] = {}
    unused = set(skip)
    for name, entry in checkpoint.entries.items():
        module = name.removesuffix(".weight")
        if module == name or len(entry.shape) != 2:
            continue
        named = {key for key in skip if f".{key}." in f".{module}."}
        unused -= named
        if named:
            left[module] = "named in skip"
        elif not re.search(r"\.\d+\.", module) or module.rpartition(".")[2] in HEAD_NAMES:
            left[module] = "not in a numbered layer: an embedding or a head, it seems"
        elif _NOT_LINEAR.search(module) or min(entry.shape) < _SMALLEST:
            left[module] = "no linear layer by its name or its shape"
        else:
            quantise[name] = False
    if unused:
        raise CheckpointError(f"skip: expected names of modules, got {sorted(unused)[0]!r}, which fits none")
    modules = sorted({*left, *HEAD_NAMES[:1]})
    for name in [name for name in quantise if _skips(modules, name.removesuffix(".weight"))]:
        del quantise[name]
        left[name.removesuffix(".weight")] = "its name ends like that of a layer that stays"
    return Choice(quantise, left, modules, f"names and shapes, as transformers cannot tell ({why_not})")
