"""Adds, trains, activates, counts and deletes the adapters of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import freezing
from .adapter import BottleneckAdapter
from .config import AdapterConfig, config_of
from .places import SITE_SUFFIX, places, root_of
from .site import AdapterSite

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Count(NamedTuple):
    """Number of parameters of an adapter, and of the model without adapters."""

    adapter: int
    model: int

    @property
    def percent(self) -> float:
        return 100 * self.adapter / max(self.model, 1)


def add(model: nn.Module, name: str, config: AdapterConfig | str = "houlsby") -> None:
    """Adds a new adapter to each layer of a model. It is inactive, and changes no result until trained.

    Layers are found by structure: self-attention and feed-forward as in BERT, RoBERTa, T5, BART, GPT-2, ViT
    and Llama. Linear layers may be dense, NF4, bitsandbytes' or wrapped by PEFT's LoRA. Parameters are fp32
    on each layer's device, and frozen until `train`. Copies of the model include the adapters.

    Parameters
    ----------
    model : nn.Module
        A transformers model, or PEFT's wrapper of one.
    name : str
        Letters, digits, "_" and "-".
    config : AdapterConfig or str
        "houlsby", "pfeiffer" or "parallel" for a preset.

    Raises
    ------
    ValueError
        Invalid or existing name; unknown config; a model without transformer layers, with a mixture of
        experts as feed-forward, or with adapters added to a part of it or to a model that contains it.
        Nothing is changed.
    """
    built = build(model, name, config_of(config))
    for _, adapter in built:
        adapter.initialise()
    insert(model, name, built)


def train(model: nn.Module, name: str | Sequence[str], freeze: bool = True) -> None:
    """Activates an adapter, or a stack of several, and makes it trainable.

    Parameters
    ----------
    freeze : bool
        Freeze everything else except task heads (a classifier, for example). False leaves other parameters
        unchanged, such as PEFT's LoRA in the same model.
    """
    wanted = checked(model, name)
    if not wanted:
        raise ValueError("name: expected an adapter or several, got none")
    set_active(model, wanted)
    freezing.start(model, [one for site in sites(model) for one in site.among(wanted)], freeze)


def set_active(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Activates one adapter, a stack of several in order, or none. Raises ValueError for an unknown name."""
    wanted = () if name is None else checked(model, name)
    for site in sites(model):
        site.active = wanted
        site.hook()


def active(model: nn.Module) -> list[str]:
    """Names of the active adapters, in order."""
    return next((list(site.active) for site in sites(model)), [])


def names(model: nn.Module) -> list[str]:
    """Names of all adapters."""
    return list(dict.fromkeys(name for site in sites(model) for name in site.adapters))


def count(model: nn.Module, name: str) -> Count:
    """Counts parameters of an adapter and of the model. Raises ValueError for an unknown name."""
    (name,) = checked(model, name)
    every = {id(p) for site in sites(model) for p in site.parameters()}
    adapter = sum(p.numel() for site in sites(model) for one in site.among((name,)) for p in one.parameters())
    return Count(adapter, sum(_numel(p) for p in model.parameters() if id(p) not in every))


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights into a byte
    return parameter.numel() if state is None else math.prod(state.shape)


def delete(model: nn.Module, name: str) -> None:
    """Deletes an adapter. After the last one in training, parameters that `train` froze become trainable
    again, unless the model was frozen since (adapter included, as PEFT does). After the last one, all hooks
    and modules are removed. Raises ValueError for an unknown name."""
    (name,) = checked(model, name)
    if any(name in stack for site in sites(model) for one in site.entered for stack in one.stacks):
        raise ValueError(f"name: expected an adapter that no `rows` serves now, got {name!r}")
    freezing.end(model, [one for site in sites(model) for one in site.among((name,))])
    left = tuple(one for one in active(model) if one != name)
    for site in sites(model):
        site.active = left
        if name in site.adapters:
            site.take_out(name)
        if not site.adapters:
            site.detach()


def sites(model: nn.Module) -> list[AdapterSite]:
    return [module for module in model.modules() if isinstance(module, AdapterSite)]


def whole(model: nn.Module, name: str) -> list[tuple[AdapterSite, BottleneckAdapter]]:
    """The sites of an adapter with its modules, if it is in each place of one model, as `add` puts it.

    Raises ValueError if parts of the model got adapters of this name separately, or the model lost layers.
    """
    (name,) = checked(model, name)
    found: dict[str, list[tuple[AdapterSite, BottleneckAdapter]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterSite) and (adapter := module.get(name)) is not None:
            root, at, rest = path.rpartition(module.place.last + SITE_SUFFIX)
            if not at or rest or not (root == "" or root.endswith(".")):
                raise ValueError(f"model: expected what adapter {name!r} was added to, got a submodule")
            found.setdefault(root[:-1], []).append((module, adapter))
    if len(found) > 1:
        where = ", ".join(root or "the model" for root in found)
        raise ValueError(f"name: expected an adapter of one model, got {name!r} of several: {where}")
    ((root, held),) = found.items()
    config = held[0][1].config
    want = [place.last for place in places(root_of(model.get_submodule(root)), config)]
    if sorted(want) != sorted(site.place.last for site, _ in held):
        raise ValueError(
            f"model: expected adapter {name!r} in {len(want)} places, as `add` puts it, got it in {len(held)}"
        )
    return held


def build(
    model: nn.Module, name: str, config: AdapterConfig, meta: bool = False
) -> list[tuple[AdapterSite, BottleneckAdapter]]:
    """A frozen adapter of zeros for each place, with its new or existing site. The model is not changed.
    `meta` creates parameters on the meta device."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name: expected letters, digits, _ and -, no attribute of ModuleDict, got {name!r}")
    if name in names(model):
        raise ValueError(f"name: there is an adapter {name!r} already")
    root, there = root_of(model), {site.place.last: site for site in sites(model)}
    found = [there.get(place.last) or AdapterSite(root, place) for place in places(root, config)]
    built = []
    for site in found:
        if not site.is_free():
            raise ValueError(
                f"model: expected the one that its adapters were added to, got another that shares "
                f"{site.place.last} with it"
            )
        adapter = site.new_adapter(config, torch.device("meta") if meta else site.device)
        built.append((site, adapter.train(root.training).requires_grad_(False)))
    return built


def insert(model: nn.Module, name: str, built: list[tuple[AdapterSite, BottleneckAdapter]]) -> None:
    now = tuple(active(model))
    for site, adapter in built:
        if not site.adapters:
            site.active = now
            site.attach()
        site.put(name, adapter)
        site.hook()


def checked(model: nn.Module, name: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(name, Sequence):
        raise ValueError(f"name: expected an adapter or several, got {name!r}")
    wanted = (name,) if isinstance(name, str) else tuple(name)
    known = names(model)
    for one in wanted:
        if one not in known:
            raise ValueError(f"name: expected one of {', '.join(known) or 'no adapters'}, got {one!r}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"name: expected different adapters, got {', '.join(wanted)}")
    return wanted
