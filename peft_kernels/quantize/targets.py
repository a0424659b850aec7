"""Selects the layers of a model to quantise, with reasons for the others."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..core.wrong_types import an
from ..nf4.experts_forward import weight_names
from ..nf4.experts_packing import NF4Experts, computes_experts, is_experts
from ..nf4.sharded.checks import is_dtensor
from ..nn import NF4Linear
from .architectures import HEAD_NAMES, heads, is_linear

logger = logging.getLogger("peft_kernels")

_WRAPPED = (".base_layer", ".original_module")  # suffixes of modules that PEFT wraps


def targets(
    model: nn.Module, skip: tuple[str, ...] | None, left: dict[str, str], tied: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yields the layers to quantise by name, and adds the reasons for skipped ones to `left`.

    `tied` names weights that will be shared once the model is loaded.
    """
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.revert_to_linear_if_dense()
    owners, adapters = _owners(model), set(_adapter_modules(model))
    stay = heads(model) if skip is None else {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or is_linear(module)
        if not linear or isinstance(module, NF4Linear) or module in adapters:
            continue
        parts = module, module._parameters.get("weight")
        shared = any(owners[id(part)] > 1 for part in parts) or f"{name}.weight" in tied
        if reason := _reason(name, module, skip, shared, stay):
            left[name] = reason
        else:
            yield name, module


def _reason(
    name: str, module: nn.Module, skip: tuple[str, ...] | None, shared: bool, stay: dict[nn.Module, str]
) -> str:
    """Why a linear layer stays dense, or ""."""
    if not is_linear(module):
        return _reason_other(module)
    if any(fits(part, name) for part in skip or ()):
        return "named in skip"
    if shared:
        return "it shares its weight with another place in the model"
    if skip is None and any(fits(part, name) for part in HEAD_NAMES):
        return "a head that may be trained; skip=() would pack it"
    if module in stay:
        return f"{stay[module]}; skip=() would pack it"
    weight = module._parameters.get("weight")
    return "" if type(weight) is nn.Parameter else f"its weight is {an(weight)}"


def _owners(model: nn.Module) -> Counter[int]:
    """In how many places each module and parameter is, by id."""
    modules = model.modules()
    held = (part for m in modules for parts in (m._modules, m._parameters) for part in parts.values())
    return Counter(map(id, held))


def choose_layers(model: nn.Module, skip: Iterable[str] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that `quantize_model` replaces by default, without those in `skip`, and reasons for other
    linear layers. Works on the meta device. Raises ValueError for a name that matches no module."""
    skip, left = tuple(skip), dict[str, str]()
    check_names(model, skip)
    chosen = dict(targets(model, None, left))
    for name in [name for name in chosen if any(fits(key, name) for key in skip)]:
        del chosen[name]
        left[name] = "named in skip"
    return chosen, left


def _reason_other(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        return "quantised by bitsandbytes"
    own = type(module).forward is not nn.Linear.forward
    return f"a subclass of nn.Linear{' with a forward of its own' if own else ''}, {type(module).__name__}"


def _plain(name: str) -> str:
    """A module's name without PEFT's wrappers."""
    for part in _WRAPPED:
        name = name.removesuffix(part)
    return name.removeprefix("base_model.model.")


def fits(key: str, name: str) -> bool:
    """Whether `key` is the name or consecutive parts of it."""
    return f".{key}." in f".{name}." or f".{key}." in f".{_plain(name)}."


def check_names(model: nn.Module, skip: Iterable[str], argument: str = "skip") -> None:
    """Raises ValueError for a name that matches no module."""
    known = [name for name, _ in model.named_modules() if name]
    for key in skip:
        if any(fits(key, name) for name in known):
            continue
        parts = sorted({part for name in known for part in (name, name.rpartition(".")[2])})
        near = difflib.get_close_matches(key, parts, n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(
            f"{argument}: expected names of modules of the model, got {key!r}, which fits none{hint}"
        )


def expert_targets(
    model: nn.Module, skip: tuple[str, ...] | None, left: dict[str, str], tied: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """As `targets`, for experts modules."""
    owners, adapters = _owners(model), set(_adapter_modules(model))
    stay = heads(model) if skip is None else {}
    for name, module in model.named_modules():
        if computes_experts(module) and any(is_dtensor(p) for p in module._parameters.values()):
            left[name] = "its weights are DTensors"
        if not is_experts(module) or module in adapters:
            continue
        parts = [module, *(module._parameters[key] for key in weight_names(module))]
        if any(fits(part, name) for part in skip or ()):
            left[name] = "named in skip"
        elif any(owners[id(part)] > 1 for part in parts) or any(key.startswith(f"{name}.") for key in tied):
            left[name] = "it shares its weights with another place in the model"
        elif module in stay:
            left[name] = f"{stay[module]}; skip=() would pack it"
        else:
            yield name, module


def choose_experts(model: nn.Module, skip: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """As `choose_layers`, for experts modules that `quantize_model(experts=True)` packs."""
    skip, left = tuple(skip), dict[str, str]()
    chosen = dict(expert_targets(model, None, left))
    for name in [name for name in chosen if any(fits(key, name) for key in skip)]:
        del chosen[name]
        left[name] = "named in skip"
    return chosen, left


def warn_about_experts(model: nn.Module, left: dict[str, str], chosen: Collection[str] = ()) -> None:
    """Warns about experts in three-dimensional parameters that stay dense, since they are most of a model.

    Skips modules in `chosen`, which are packed, and in `left`, whose reasons are reported.
    """
    known: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (NF4Experts, _ConvNd)) or name in left or name in chosen:
            continue
        dense = {key: p for key, p in module._parameters.items() if p is not None and _looks_like_experts(p)}
        if is_experts(module):
            known[name] = sum(module._parameters[key].nbytes for key in weight_names(module))
        else:
            unknown |= {f"{name}.{key}" if name else key: p.nbytes for key, p in dense.items()}
    left.update(dict.fromkeys(known, "experts; experts=True would pack them"))
    left.update(dict.fromkeys(unknown, "three-dimensional, and in no module of experts that is known here"))
    for found, what, advice in (
        (known, "sets of experts", "experts=True packs them"),
        (unknown, "three-dimensional parameters (mixture-of-experts weights)", "nothing packs them"),
    ):
        if found:
            logger.warning(
                "%d %s stay dense, %.3g MB in all; %s; the first: %s",
                *(len(found), what, sum(found.values()) / 1e6, advice, next(iter(found))),
            )


def _looks_like_experts(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 3 and parameter.is_floating_point() and parameter.numel() > 1e6


def _adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that PEFT added: everything inside its layers except the wrapped ones."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for name, child in module.named_children():
                if name not in ("base_layer", "original_module"):
                    yield from child.modules()
