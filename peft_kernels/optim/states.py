"""The state of a parameter, in bitsandbytes' layout: made, read from a checkpoint, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..code_tables import dynamic_map
from ..ops.adamw import STATE_BLOCK

WRAPPED = "__bnb_optimizer_quant_state__"
"""Under which bitsandbytes from 0.49 on puts what FSDP must not gather."""


def moment_names(lion: bool) -> tuple[int, ...]:
    """The numbers of state1, state2."""
    return (1,) if lion else (1, 2)


def blocks_of(parameter: Tensor) -> int:
    """How many absmax values one moment of it has."""
    return -(-parameter.numel() // STATE_BLOCK)


def unwrapped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state of a checkpoint, flat: bitsandbytes nests it since 0.49."""
    flat = dict(entry)
    flat.update(flat.pop(WRAPPED, {}))
    return flat


def checked(entry: Mapping[str, Any], parameter: Tensor, what: str, lion: bool) -> dict[str, Any]:
    """A parameter's state as a step takes it, on the parameter's device. ValueError that names what is wrong.

    Tensors are copied: what is loaded is not shared with the checkpoint.
    """
    missing = [name for name in ("step", *(f"state{i}" for i in moment_names(lion))) if name not in entry]
    if missing:
        raise ValueError(
            f"{what}: its state has no {', '.join(missing)}; has {', '.join(entry) or 'nothing'}"
        )
    found = dict(entry)
    device = parameter.device
    for i in moment_names(lion):
        name = f"state{i}"
        state = _tensor(entry, name, what)
        if state.shape != parameter.shape:
            expected, got = tuple(parameter.shape), tuple(state.shape)
            raise ValueError(f"{what}: {name}: expected shape {expected} like the parameter, got {got}")
        if state.dtype == torch.uint8:
            found[name] = state.to(device, copy=True).contiguous()
            found[f"absmax{i}"] = _absmax(entry, i, parameter, what)
            found[f"qmap{i}"] = _qmap(entry, i, device, what)
        elif state.is_floating_point():
            found[name] = state.to(device, torch.float32, copy=True).contiguous()
        else:
            raise ValueError(f"{what}: {name}: expected uint8 or float32, got {state.dtype}")
    if len({found[f"state{i}"].dtype for i in moment_names(lion)}) > 1:
        raise ValueError(f"{what}: state1 and state2: expected both in 8 bits or both in 32, got one of each")
    found["step"] = int(entry["step"])
    if found["step"] < 0:
        raise ValueError(f"{what}: step: expected at least 0, got {found['step']}")
    return found


def _absmax(entry: Mapping[str, Any], i: int, parameter: Tensor, what: str) -> Tensor:
    absmax, blocks = _tensor(entry, f"absmax{i}", what), blocks_of(parameter)
    if absmax.numel() != blocks:
        size = -(-parameter.numel() // max(absmax.numel(), 1))
        raise ValueError(
            f"{what}: absmax{i}: expected {blocks} values, one for each {STATE_BLOCK} elements, got "
            f"{absmax.numel()}: these are states in blocks of about {size}"
        )
    return absmax.reshape(-1).to(parameter.device, torch.float32, copy=True)


def _qmap(entry: Mapping[str, Any], i: int, device: torch.device, what: str) -> Tensor:
    ours = dynamic_map(device, signed=i == 1)
    qmap = _tensor(entry, f"qmap{i}", what)
    if qmap.shape != ours.shape or not torch.allclose(
        qmap.to(device, torch.float32), ours, rtol=1e-5, atol=1e-9
    ):
        kind = "signed" if i == 1 else "unsigned"
        raise ValueError(f"{what}: qmap{i}: expected the {kind} dynamic map, got another one")
    return ours


def _tensor(entry: Mapping[str, Any], name: str, what: str) -> Tensor:
    value = entry.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{what}: {name}: expected a tensor, got {type(value).__name__}")
    return value
