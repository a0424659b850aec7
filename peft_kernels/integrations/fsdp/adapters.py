"""Initialises new PEFT adapters that are on the meta device, after the base is loaded.

They are initialised whole, like PEFT does, from one seed in all processes; each keeps its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.wrong_types import an
from ...nf4.sharded.checks import is_dtensor, is_sharded
from ...nf4.sharded.ranks import first_value, groups_of, local_slices, make_parameter
from ...nf4.weight import PackedWeight

Tensors = dict[str, Any]
"""The parameters or the buffers of a module."""

_SUPPORTED_INITS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that depend only on shapes."""


def is_peft(model: nn.Module) -> bool:
    return "peft" in sys.modules and hasattr(model, "peft_config")


def prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of all adapter parameters of a PEFT model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = {"prompt_encoder."}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            names = (*module.adapter_layer_names, *module.other_param_names)
            found |= {f"{prefix}.{name}." for name in names}
    return tuple(found)


def base_names(model: Any) -> Callable[[str], str]:
    """A function from parameter names of a PEFT model to names in a checkpoint of the base."""
    base = model.get_base_model()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base), "")

    def named(name: str) -> str:
        for inner in (".token_adapter.base_layer.", ".base_layer.", ".original_module."):
            name = name.replace(inner, ".")
        return name.removeprefix(prefix)

    return named


def unsupported_reason(model: Any) -> str | None:
    """Why adapters on the meta device cannot be initialised, or None."""
    for name, layer in _lora_layers(model):
        for adapter in _adapters(layer):
            if not any(tensors[key].is_meta for tensors, key in _matrices(layer, adapter)):
                continue
            config = model.peft_config[adapter]
            if config.init_lora_weights not in _SUPPORTED_INITS:
                return (
                    "init_lora_weights: expected True, False, 'gaussian' or 'orthogonal' for adapters on the "
                    f"meta device, got {config.init_lora_weights!r}, which depends on weights: "
                    "add that adapter to a model that is loaded whole, before fully_shard"
                )
            magnitude = _magnitude(layer, adapter)
            if magnitude is not None and (
                type(magnitude).__name__ != "DoraLinearLayer" or magnitude.fan_in_fan_out
            ):
                return (
                    f"use_dora: expected False for {name}, {an(layer.get_base_layer())} on the "
                    "meta device, got True: only linear layers are supported there"
                )
    known = {id(tensors[key]) for tensors, key in initialisable(model)}
    begin = prefixes(model)
    for name, p in model.named_parameters():
        if p.is_meta and name.startswith(begin) and id(p) not in known:
            kinds = ", ".join(
                sorted({str(c.peft_type).rpartition(".")[2] for c in model.peft_config.values()})
            )
            return (
                f"{name}: expected a parameter of LoRA, DoRA, modules_to_save or trainable_token_indices on "
                f"the meta device, got another of {kinds}: add that adapter to a model that is loaded "
                "whole, before fully_shard"
            )
    return None


def initialise(model: Any, mesh: Any, device: torch.device) -> None:
    """Initialises adapter parameters that are on the meta device, on `device`. Every process must call it."""
    seed = first_value(int(torch.randint(1 << 62, ())), groups_of(mesh))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for _, layer in _lora_layers(model):
            for adapter in _adapters(layer):
                _initialise_lora(layer, adapter, model.peft_config[adapter].init_lora_weights, device)
        made: dict[int, nn.Parameter] = {}
        for tensors, key, base, rows in _copies(model):
            place = tensors[key]
            if not place.is_meta or base.is_meta:
                continue
            if id(place) not in made:
                made[id(place)] = make_parameter(place, _copied(place, base, rows).to(place.dtype), device)
            tensors[key] = made[id(place)] if isinstance(place, nn.Parameter) else made[id(place)].detach()


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _adapters(layer: Any) -> list[str]:
    return [*layer.lora_A, *layer.lora_embedding_A]


def _linears(layer: Any, adapter: str) -> list[nn.Linear]:
    return [linears[adapter] for linears in (layer.lora_A, layer.lora_B) if adapter in linears]


def _matrices(layer: Any, adapter: str) -> list[tuple[Tensors, str]]:
    """Places of A and B, and of their biases."""
    found = [(linear._parameters, name) for linear in _linears(layer, adapter) for name in linear._parameters]
    embeddings = layer.lora_embedding_A, layer.lora_embedding_B
    found += [(matrices._parameters, adapter) for matrices in embeddings if adapter in matrices]
    return [(tensors, key) for tensors, key in found if tensors[key] is not None]


def _magnitude(layer: Any, adapter: str) -> Any:
    vectors = layer.lora_magnitude_vector
    return vectors[adapter] if adapter in vectors else None  # noqa: SIM401, a ModuleDict has no get


def initialisable(model: Any) -> Iterator[tuple[Tensors, str]]:
    """Places of the parameters and buffers that `initialise` creates."""
    for _, layer in _lora_layers(model):
        for adapter in _adapters(layer):
            yield from _matrices(layer, adapter)
            if (magnitude := _magnitude(layer, adapter)) is not None:
                yield magnitude._parameters, "weight"
    yield from ((tensors, key) for tensors, key, _, _ in _copies(model))


def _copies(model: Any) -> Iterator[tuple[Tensors, str, Tensor, list[int] | None]]:
    """Tensors of modules_to_save and trainable_token_indices that are copies of the base: their place, the
    base's tensor, and its rows if not all."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                originals: Any = module.original_module.modules()
                for part, original in zip(copy.modules(), originals, strict=True):
                    held: Any = (part._parameters, original._parameters), (part._buffers, original._buffers)
                    for tensors, base in held:
                        yield from (
                            (tensors, key, base[key], None) for key, t in tensors.items() if t is not None
                        )
        if isinstance(module, TrainableTokensLayer):
            weight: Any = module.get_base_layer().weight
            for adapter, rows in module.token_indices.items():
                yield module.trainable_tokens_delta._parameters, adapter, weight, rows
                yield module.trainable_tokens_original._buffers, adapter, weight, rows


def _copied(place: Any, base: Any, rows: list[int] | None) -> Tensor:
    """This process's part of a copy of a base parameter."""
    if rows is None and is_dtensor(place) and is_dtensor(base) and place._spec == base._spec:
        found: Tensor = base.to_local()
    else:
        found = _whole(base)
        found = (found if rows is None else found[rows])[local_slices(place)]
    return found.detach().clone()


def _whole(weight: Any) -> Tensor:
    """A gathered parameter. Every process must call it."""
    found: Any = weight.detach()
    whole: Tensor = found.full_tensor() if is_dtensor(found) else found
    return whole


def _initialise_lora(layer: Any, adapter: str, init: Any, device: torch.device) -> None:
    """Initialises A, B and magnitudes, if A and B are on the meta device."""
    places = [(tensors, key, tensors[key]) for tensors, key in _matrices(layer, adapter)]
    if not all(place.is_meta for _, _, place in places):
        return
    linears = _linears(layer, adapter)
    for tensors, key, place in places:
        tensors[key] = nn.Parameter(torch.empty(place.shape, dtype=place.dtype), place.requires_grad)
        nn.init.normal_(tensors[key])  # as PEFT initialises embeddings
    for linear in linears:
        linear.reset_parameters()
    if init == "orthogonal" and linears:
        layer.orthogonal_init(adapter)
    elif init:
        layer.reset_lora_parameters(adapter, True if init == "orthogonal" else init)
    magnitude = _magnitude(layer, adapter)
    base = layer.get_base_layer().weight
    if magnitude is not None and not base.is_meta:
        place = magnitude._parameters["weight"]
        (rows,) = local_slices(place)
        dense = _rows(base, rows)
        lora_a, lora_b = (linear.weight.to(dense.device) for linear in linears)
        norms = magnitude.get_weight_norm(dense, lora_b[rows] @ lora_a, layer.scaling[adapter])
        magnitude._parameters["weight"] = make_parameter(place, norms.to(place.dtype), device)
    for tensors, key, place in places:
        mine = tensors[key].detach().to(place.dtype)[local_slices(place)].clone()
        tensors[key] = make_parameter(place, mine, device)


def _rows(weight: Any, rows: slice) -> Tensor:
    """Dense rows of a base weight, without gathering if this process holds them."""
    part = weight._local_tensor._rows if is_sharded(weight) else None
    if part is not None and (rows.start, rows.stop) == (part.start, part.stop):
        dense = part.dequantize(weight.dtype)
    else:
        whole = _whole(weight)
        dense = (whole.dequantize() if isinstance(whole, PackedWeight) else whole)[rows]
    return dense.float() if dense.dtype == torch.float16 else dense  # as in PEFT
