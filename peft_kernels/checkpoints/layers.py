"""Selects the weights of a model on disk that are packed, without loading it.

Uses the architecture that config.json names, built on the meta device, or names and shapes if transformers
does not know it. The selection matches what bitsandbytes' loaders expect to be 4-bit: `llm_int8_skip_modules`
lists the linear layers that stay dense. With packed experts, or in a format that bitsandbytes lacks, only our
own loader reads the result, and it decides by the file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.code_tables import WEIGHT_DTYPES
from ..core.wrong_types import an
from ..nf4.bitsandbytes_format import QUANT_TYPES
from ..nf4.experts_packing import computes_experts
from ..quantize.architectures import HEAD_NAMES
from ..quantize.targets import choose_experts, choose_layers
from .architecture import compare_with, on_meta
from .experts_tensors import ExpertsWeight, find
from .folder import Checkpoint
from .header import CheckpointError
from .names import Names

_NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|(^|[._])ln[._\d]|position|relative|router|conv|(^|\.)gate$")
_SMALLEST = 64  # minimum dimension of a linear layer recognised by name and shape


@dataclass
class Choice:
    quantise: dict[str, bool]
    """Names of weights in the checkpoint, and whether they are stored transposed, as (in, out)."""
    left: dict[str, str]
    """Why other weights of linear layers or experts stay dense."""
    skip_modules: list[str]
    """Names of dense linear layers for the configuration."""
    source: str
    """How the linear layers were determined."""
    experts: dict[str, ExpertsWeight] = field(default_factory=dict)
    """Weights of experts to pack, by name in the model."""
    dense_experts: int = 0
    """Bytes of experts that stay dense, but that `experts=True` would pack."""
    other_experts: int = 0
    """Bytes of experts that cannot be packed."""


def choose(
    checkpoint: Checkpoint,
    skip: Iterable[str] = (),
    experts: bool = False,
    partial: bool = False,
    format: str = "nf4",
) -> Choice:
    """The selection. Raises CheckpointError if a name in `skip` matches nothing, nothing can be quantised, or
    experts cannot be packed; and unless `partial`, if tensors of the architecture are missing or have other
    shapes."""
    try:
        model, why_not = on_meta(checkpoint), ""
    except Exception as error:  # transformers may raise anything for an unknown configuration
        model, why_not = None, " ".join(str(error).split())[:100] or type(error).__name__
    skip = tuple(skip)
    if model is None:
        if experts:
            raise CheckpointError(f"experts: expected an architecture that transformers knows ({why_not})")
        choice = _by_names(checkpoint, skip, why_not)
    else:
        choice = _by_classes(checkpoint, model, skip, experts, format)
        _check_complete(checkpoint, model, partial)
    for name in list(choice.quantise):
        dtype = checkpoint.entries[name].dtype
        if dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{name}: expected float32, bfloat16 or float16, got {dtype}")
    if not choice.quantise and not choice.experts:
        raise CheckpointError(f"{checkpoint.path}: expected linear layers to quantise, found none")
    return choice


def _check_complete(checkpoint: Checkpoint, model: Any, partial: bool) -> None:
    found = [] if partial else compare_with(checkpoint, model).faults
    if found:
        more = f"; {len(found) - 1} more such faults" if len(found) > 1 else ""
        raise CheckpointError(f"{found[0]}{more} (--partial quantises what is there)")


def _by_classes(
    checkpoint: Checkpoint, model: Any, skip: tuple[str, ...], experts: bool, format: str
) -> Choice:
    try:
        chosen, left = choose_layers(model, skip)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    names, every = Names(model), dict(model.named_modules())
    heads = _heads_it_lacks(checkpoint, names, every, chosen)
    left |= dict.fromkeys(heads, f"a head, it seems, which {type(model).__name__} lacks")
    theirs = not experts and format in QUANT_TYPES
    skip_modules = _leave_to_bitsandbytes(model, chosen, left, heads) if theirs else []
    modules, left_experts = choose_experts(model, skip)
    weights = find(checkpoint, model, modules, names)
    left |= left_experts
    quantise, in_model, other_experts = dict[str, bool](), set[str](), 0
    for name, entry in checkpoint.entries.items():
        target, pattern = names.in_model(name)
        owner, _dot, item = target.rpartition(".")
        if pattern is None and item == "weight" and owner in chosen and len(entry.shape) == 2:
            quantise[name] = type(chosen[owner]).__name__ == "Conv1D"
            in_model.add(owner)
        elif form := _unknown_experts(name, entry, owner, every, left):
            left[name] = f"of experts, {form}"
            other_experts += entry.nbytes
    if not quantise and not (experts and weights):
        raise CheckpointError(
            f"{checkpoint.path}: none of its tensors is a linear layer of {type(model).__name__}, "
            "the architecture that config.json names"
        )
    source = f"{type(model).__name__} of transformers"
    choice = Choice(quantise, left, skip_modules, source, other_experts=other_experts)
    if not theirs:
        choice.skip_modules = _names_for_us(model, in_model, "experts" if experts else "format")
    if experts:
        choice.experts = weights
        _check(choice, left_experts)
    else:
        choice.dense_experts = sum(weight.nbytes for weight in weights.values())
        why = "experts, which bitsandbytes' format does not have in 4 bits"
        left.update(dict.fromkeys(modules, why if theirs else "experts; experts=True would pack them"))
    return choice


def _unknown_experts(name: str, entry: Any, owner: str, every: Any, left: dict[str, str]) -> str:
    """What keeps experts dense that nothing else explains, or ""."""
    known = owner in left or (owner in every and computes_experts(every[owner]))
    if known or "experts" not in name or len(entry.shape) not in (2, 3):
        return ""
    return "in a form that is not packed" if owner in every else "which the architecture lacks"


def _heads_it_lacks(
    checkpoint: Checkpoint, names: Names, every: dict[str, Any], chosen: dict[str, nn.Module]
) -> list[str]:
    """Heads in the files that the built architecture lacks; a loader may build the class with the head."""
    found = []
    for name, entry in checkpoint.entries.items():
        owner, _dot, item = names.in_model(name)[0].rpartition(".")
        here = owner in every or bool(re.search(r"\.\d+\.", owner))
        head = item == "weight" and owner and not here and len(entry.shape) == 2
        if head and not any(_skips([owner], other) for other in chosen):
            found.append(owner)
    return found


def _leave_to_bitsandbytes(
    model: Any, chosen: dict[str, nn.Module], left: dict[str, str], heads: list[str]
) -> list[str]:
    """Drops layers that bitsandbytes' loaders do not read in 4 bits. Returns names of all dense linear layers
    and heads."""
    for name, module in list(chosen.items()):
        if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
            del chosen[name]
            left[name] = f"{an(module)}, which bitsandbytes' loaders do not read in 4 bits"
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    skip_modules = sorted({*heads, *linear} - chosen.keys())
    for name in [name for name in chosen if _skips(skip_modules, name)]:
        del chosen[name]
        left[name] = "its name ends like that of a dense layer, which loaders cannot tell apart"
    return skip_modules


def _names_for_us(model: Any, packed: set[str], argument: str) -> list[str]:
    try:
        from ..quantize.transformers.quantizer import names_of_dense
    except ImportError as error:
        raise CheckpointError(f"{argument}: {error}") from error
    return names_of_dense(model, packed)


def _check(choice: Choice, left: dict[str, str]) -> None:
    if not choice.experts:
        name, why = next(iter(left.items()), ("", ""))
        other = next((name for name, why in choice.left.items() if why.startswith("of experts")), "")
        reason = f"; {name}: {why}" if name else f"; {other} is none of that kind" if other else ""
        raise CheckpointError(
            f"experts: expected experts as transformers 5 computes them, got none in {choice.source}{reason}"
        )
    for weight in choice.experts.values():
        weight.check()


def _skips(skip_modules: Iterable[str], name: str) -> bool:
    """Whether a loader of transformers skips the module because of one of these names."""
    return any(name == key or name.startswith(f"{key}.") or name.endswith(key) for key in skip_modules)


def _by_names(checkpoint: Checkpoint, skip: tuple[str, ...], why_not: str) -> Choice:
    """Selects matrices inside numbered layers whose names do not suggest anything else."""
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
            left[module] = "not a linear layer by its name or shape"
        else:
            quantise[name] = False
    if unused:
        raise CheckpointError(f"skip: expected names of modules, got {sorted(unused)[0]!r}, which fits none")
    modules = sorted({*left, *HEAD_NAMES[:1]})
    for name in [name for name in quantise if _skips(modules, name.removesuffix(".weight"))]:
        del quantise[name]
        left[name.removesuffix(".weight")] = "its name ends like that of a dense layer"
    return Choice(quantise, left, modules, f"names and shapes, as transformers does not know it ({why_not})")
