"""Finds where adapters go in a model, by its structure.

A transformer layer is an element of a ModuleList with one self-attention, and other linear layers, the
feed-forward. A sublayer ends at its last linear layer whose output has the model's number of features, and
begins at the first other one whose input has. Attention is recognised by an attribute name with "att", as in
every family of transformers; cross-attention by one that also has "cross" or "enc".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..quantize.architectures import is_linear
from .config import AdapterConfig

SITE_SUFFIX = "_adapters"
"""Suffix of the attribute of the module that holds a projection's adapters."""


@dataclass(frozen=True)
class Place:
    """One sublayer. Names are relative to the root of the model (`root_of`)."""

    layer: str
    first: str
    """The first linear layer."""
    last: str
    """The last linear layer."""
    features: int
    norm: str | None
    """Attribute of the only layer norm next to the last linear layer, as in BERT, or None."""


def root_of(model: nn.Module) -> nn.Module:
    """The model without DDP, torch.compile, PEFT and a transformers head around it, so that names of places
    do not depend on them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return root_of(model.module)
    if "_orig_mod" in model._modules:  # torch.compile
        return root_of(model.get_submodule("_orig_mod"))
    get_base: Any = getattr(model, "get_base_model", None)
    if get_base is not None:  # PEFT
        return root_of(get_base())
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            base: nn.Module = model.base_model
            return base
    return model


def places(root: nn.Module, config: AdapterConfig) -> list[Place]:
    """Places in the order of the layers, attention before feed-forward.

    Raises ValueError if there are no transformer layers, or a layer lacks what `config` needs.
    """
    found = [place for name, layer in _layers(root, "") for place in _of_layer(name, layer, config)]
    if not found:
        raise ValueError(
            f"model: expected layers of a transformer (self-attention and feed-forward), found none in "
            f"{type(root).__name__}"
        )
    return found


def base_of(layer: nn.Module) -> Any:
    """The linear layer inside PEFT's wrapper."""
    get_base: Any = getattr(layer, "get_base_layer", None)
    return layer if get_base is None else get_base()


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from _layers(child, f"{path}{name}.")
            continue
        elements = [(f"{path}{name}.{i}", element) for i, element in child.named_children()]
        chosen = [_is_layer(element) for _, element in elements]
        if any(chosen) and not all(chosen):
            other = elements[chosen.index(False)][0]
            raise ValueError(
                f"{other}: expected one self-attention and a feed-forward, like in its neighbours, got none"
            )
        for element_path, element in elements:
            if any(chosen):
                yield element_path, element
            else:
                yield from _layers(element, f"{element_path}.")


def _is_layer(module: nn.Module) -> bool:
    attentions, others = _sublayers(module)
    has_experts = any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())
    return len(attentions) == 1 and (bool(others) or has_experts)


Linears = list[tuple[str, nn.Module]]


def _sublayers(layer: nn.Module) -> tuple[dict[str, Linears], Linears]:
    """Linear layers of each self-attention, and those outside of attention."""
    attentions: dict[str, Linears] = {}
    others: Linears = []
    for name, module in _linears(layer, ""):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if "att" in part.lower()), None)
        if at is None:
            others.append((name, module))
        elif not any(word in parts[at].lower() for word in ("cross", "enc")):
            attentions.setdefault(".".join(parts[: at + 1]), []).append((name, module))
    return attentions, others


def _linears(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        base = base_of(child)
        if isinstance(base, nn.Linear) or is_linear(base):
            yield path + name, child
        elif not name.endswith(SITE_SUFFIX):
            yield from _linears(child, f"{path}{name}.")


def _of_layer(name: str, layer: nn.Module, config: AdapterConfig) -> Iterator[Place]:
    attentions, others = _sublayers(layer)
    (attention,) = attentions.values()
    features = _sizes(attention[0][1])[0]
    if config.attention:
        yield _place(name, layer, "an attention", attention, features, config)
    if config.feed_forward:
        if any(inside.rpartition(".")[2] == "experts" for inside, _ in layer.named_modules()):
            raise ValueError(f"{name}: expected a feed-forward, got a mixture of experts")
        yield _place(name, layer, "a feed-forward", others, features, config)


def _place(
    path: str, layer: nn.Module, kind: str, linears: Linears, features: int, config: AdapterConfig
) -> Place:
    last = [name for name, module in linears if _sizes(module)[1] == features][-1:]
    first = [name for name, module in linears if _sizes(module)[0] == features and name not in last]
    if not first or not last:
        got = ", ".join(f"{name} {_sizes(module)}" for name, module in linears) or "no linear layers"
        raise ValueError(f"{path}: expected {kind} from and to {features} features, got {got}")
    parent = last[0].rpartition(".")[0]
    beside = layer.get_submodule(parent).named_children() if parent else ()
    norms = [name for name, module in beside if isinstance(module, nn.LayerNorm)]
    norm = norms[0] if len(norms) == 1 else None
    if config.after_norm and norm is None:
        raise ValueError(
            f"{path}: expected one layer norm next to {last[0]}, which after_norm reads, got {len(norms)}"
        )
    return Place(path, f"{path}.{first[0]}", f"{path}.{last[0]}", features, norm)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)"""
    base = base_of(layer)
    return (base.in_features, base.out_features) if hasattr(base, "in_features") else (base.nx, base.nf)
