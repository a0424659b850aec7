"""Adapters of a model by name: put in, trained, made active, counted, taken out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..integrations.architectures import in_task_head
from .config import AdapterConfig, config_of
from .places import places, root_of
from .site import AdapterSite, BottleneckAdapter

RECORD = "_peft_kernels_adapters"
"""The attribute of a module that holds the names of its parameters that `train` has frozen."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Count(NamedTuple):
    """Parameters of an adapter, and of the model without any."""

    adapter: int
    model: int

    @property
    def percent(self) -> float:
        return 100 * self.adapter / max(self.model, 1)


def add(model: nn.Module, name: str, config: AdapterConfig | str = "houlsby") -> None:
    """Put a new adapter into each layer of a model. It is not active, and changes nothing until it is
    trained.

    Layers are found by structure: self-attention and feed-forward of BERT, RoBERTa, T5, BART, GPT-2, ViT,
    Llama and of what is built like them; linear layers may be dense, NF4, bitsandbytes' or with LoRA of PEFT.
    Its parameters are fp32 on each layer's device, and frozen until `train`. Copies of the model have the
    adapters too.

    Parameters
    ----------
    model : nn.Module
        Of transformers, or PEFT's around one.
    name : str
        Of letters, digits, "_" and "-".
    config : AdapterConfig or str
        "houlsby", "pfeiffer" or "parallel", with its defaults.

    Raises
    ------
    ValueError
        The name is taken or no name, the config unknown, the model without layers of a transformer or with a
        mixture of experts where the feed-forward should be, or with adapters that were added to a part of it
        or to what it is a part of. Nothing is changed.
    """
    built = build(model, name, config_of(config))
    for _, adapter in built:
        adapter.initialise()
    insert(model, name, built)


def train(model: nn.Module, name: str | Sequence[str], freeze: bool = True) -> None:
    """Make an adapter, or a stack of several, active and trainable.

    Parameters
    ----------
    freeze : bool
        Freeze everything else, but the head of a classifier or the like, which is new with the task. False
        leaves other parameters as they are: LoRA of PEFT in the same model, for example.
    """
    wanted = checked(model, name)
    if not wanted:
        raise ValueError("name: expected an adapter or several, got none")
    set_active(model, wanted)
    if freeze:
        _freeze(model)
    for site in sites(model):
        for one in wanted:
            if one in site.adapters:
                site.adapters[one].requires_grad_(True)


def set_active(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Which adapter works: one, a stack of several in their order, or none. ValueError for one that is not
    there."""
    wanted = () if name is None else checked(model, name)
    for site in sites(model):
        site.active = wanted
        site.hook()


def active(model: nn.Module) -> list[str]:
    """The adapters that work, in their order."""
    return next((list(site.active) for site in sites(model)), [])


def names(model: nn.Module) -> list[str]:
    """Of all adapters."""
    return list(dict.fromkeys(name for site in sites(model) for name in site.adapters))


def count(model: nn.Module, name: str) -> Count:
    """Parameters of an adapter, and of the model without adapters. ValueError for one that is not there."""
    (name,) = checked(model, name)
    every = {id(p) for site in sites(model) for p in site.parameters()}
    adapter = sum(
        p.numel() for site in sites(model) if name in site.adapters for p in site.adapters[name].parameters()
    )
    return Count(adapter, sum(_numel(p) for p in model.parameters() if id(p) not in every))


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights into a byte
    return parameter.numel() if state is None else math.prod(state.shape)


def delete(model: nn.Module, name: str) -> None:
    """Take an adapter out. With the last one everything goes that `add` and `train` have done to the model.
    ValueError for one that is not there."""
    (name,) = checked(model, name)
    left = tuple(one for one in active(model) if one != name)
    for site in sites(model):
        site.active = left
        if name in site.adapters:
            del site.adapters[name]
        if not site.adapters:
            site.detach()
    if not sites(model):
        for module in model.modules():
            for frozen in vars(module).pop(RECORD, ()):
                parameter = module._parameters.get(frozen)
                if parameter is not None:
                    parameter.requires_grad_(True)


def sites(model: nn.Module) -> list[AdapterSite]:
    return [module for module in model.modules() if isinstance(module, AdapterSite)]


def build(
    model: nn.Module, name: str, config: AdapterConfig, meta: bool = False
) -> list[tuple[AdapterSite, BottleneckAdapter]]:
    """An adapter for each place, of zeros and frozen, and the sites that they are for, new or not; the model
    is not changed. `meta`: without memory for parameters."""
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
        site.adapters[name] = adapter
        site.hook()


def _freeze(model: nn.Module) -> None:
    heads = {module for head in in_task_head(model) for module in head.modules()}
    for module in model.modules():
        if module in heads:
            continue
        frozen = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
        for name in frozen:
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        if frozen and not isinstance(module, BottleneckAdapter):
            vars(module)[RECORD] = [*vars(module).get(RECORD, ()), *frozen]


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
