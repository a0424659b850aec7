"""Loads a layer's weight from a state dict: packed items, or dense values if the weight is dense."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.packed_state import PackedState
from .sharded import accelerate_loading
from .sharded.checks import is_dtensor, is_sharded, load_rows
from .weight import PackedWeight


def load_layer(
    module: nn.Module,
    weights: Mapping[str, Any],
    transpose: Callable[[Tensor], Tensor],
    load_rest: Callable[..., None],
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """`_load_from_state_dict` of a module: `weights`, its packed parameters by name, all or none of them, and
    the rest by `load_rest`, that of its class. `transpose` as in `read_weight`."""
    new, mine = dict[str, Tensor](), set[str]()
    for name, weight in weights.items():
        key = prefix + name
        items = {k for k in state_dict if k == key or k.startswith(f"{key}.")}
        mine |= items
        if not items and accelerate_loading.is_awaited(weight):
            accelerate_loading.receive(module, name, key, state_dict)
        elif not items:
            missing_keys.append(key)
        else:
            try:
                new[name] = read_weight(weight, state_dict, prefix, name, transpose)
            except ValueError as error:
                error_msgs.append(str(error))
                return  # load nothing rather than half a module
    rest = {k: v for k, v in state_dict.items() if k not in mine}
    parameters, errors = module._parameters, len(error_msgs)
    module.__dict__["_parameters"] = {k: v for k, v in parameters.items() if k not in weights}
    try:
        load_rest(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
    finally:
        parameters.update(module._parameters)  # with `assign=True` the others were replaced
        module.__dict__["_parameters"] = parameters
    if len(error_msgs) == errors:
        with torch.no_grad():
            for name, loaded in new.items():
                assign = local_metadata.get("assign_to_params_buffers", False)
                assign_weight(module, prefix + name, loaded, assign)


def read_weight(
    own: Tensor, state_dict: Mapping[str, Any], prefix: str, name: str, transpose: Callable[[Tensor], Tensor]
) -> Tensor:
    """The PackedWeight or the dense values that a state dict has for the weight `own`.

    `transpose` converts dense values to the layout of `own`. Raises ValueError for what does not fit.
    """
    key = prefix + name
    values: Any = state_dict.get(key)
    alone = not any(item.startswith(f"{key}.") for item in state_dict)
    new: Tensor
    if is_dtensor(values):
        new = values.detach()
    elif alone and isinstance(values, Tensor) and values.is_floating_point():
        if not (own.is_dense if isinstance(own, PackedWeight) else not is_dtensor(own)):
            raise ValueError(
                f"{key}: expected the items of an NF4 weight, got dense values alone, which a weight takes "
                "only while it is dense itself (merged, or started by PiSSA or OLoRA); load a dense "
                "checkpoint before quantize_model"
            )
        new = transpose(values.detach()) if values.dim() == own.dim() else values
    else:
        new = PackedWeight.from_state_dict(state_dict, prefix, name)
        if isinstance(own, PackedWeight):
            new._state.name = own._state.name
    if new.shape != own.shape:
        raise ValueError(f"{key}: expected shape {tuple(own.shape)}, got {tuple(new.shape)}")
    return new


def assign_weight(module: nn.Module, key: str, new: Tensor, assign: bool) -> None:
    """Makes `new` the weight of a module. Replaces its data instead of copying, since the nominal dtype is
    saved too.

    A merged weight with the same dense values is left as it is, so that the merge can still be undone.
    """
    name = key.rpartition(".")[2]
    own: Any = module._parameters[name]
    if is_sharded(own) and isinstance(new, PackedWeight):
        load_rows(own, new, new.device if assign else None)
        return
    is_ours = isinstance(own, PackedWeight)
    if is_ours and own._state.holds(new):
        return
    if assign:
        if is_ours and not isinstance(new, PackedWeight):
            form = PackedState(
                tuple(own.shape), own.blocksize, double_quant=own.double_quant, format=own._state.format
            )
            form.dense, form.name = new, own._state.name
            made = PackedWeight(form, new.dtype)
            made._is_param = True  # nn.Parameter() refuses a dense one, whose detach() is an ordinary tensor
            module._parameters[name] = made  # type: ignore[assignment]
        else:
            module._parameters[name] = nn.Parameter(new, requires_grad=own.requires_grad)
        return
    if own.is_meta and not new.is_meta:
        warnings.warn(
            f"{key}: loaded into a weight on the meta device, which stays empty: pass assign=True, or call "
            "to_empty(device=...) first",
            stacklevel=2,
        )
    dtype = new.dtype if isinstance(new, PackedWeight) else own.dtype
    own.data = new.to(own.device, dtype, copy=True)
