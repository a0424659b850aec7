"""Reads and checks an optimizer's state_dict completely before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from .groups import check_numbers
from .sharded import Layout, is_sharded, part_of, whole_of
from .states import Copied, checked, in_own_blocks, unwrapped

State = dict[str, Any]


def read(
    state_dict: Mapping[str, Any],
    mine: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    names: Mapping[Tensor, str],
    lion: bool,
    copied: Copied,
) -> tuple[dict[Tensor, State], list[State]]:
    """The states of parameters, as a step takes them, and the groups that replace `mine`.

    Shares no memory with the state_dict. Raises ValueError for what is missing or does not fit.
    """
    saved = _groups(state_dict, mine)
    by_key = {
        key: p
        for group, own in zip(saved, mine, strict=True)
        for key, p in zip(group["params"], own["params"], strict=True)
    }
    if unknown := [key for key in state_dict["state"] if key not in by_key]:
        raise ValueError(f"state: expected entries for parameters of param_groups, got {unknown[:3]}")
    states = {}
    for key, entry in state_dict["state"].items():
        p, what = by_key[key], names[by_key[key]]
        if not isinstance(entry, Mapping):
            raise ValueError(f"{what}: its state: expected a dict, got {type(entry).__name__}")
        if flat := unwrapped(entry):
            states[p] = checked(_local(flat, p, what), part_of(p), what, lion, copied)
    kept = ("params", "param_names")
    groups = [
        {**defaults, **group, **{name: own[name] for name in kept if name in own}}
        for group, own in zip(saved, mine, strict=True)
    ]
    return states, groups


def _groups(state_dict: Mapping[str, Any], mine: Sequence[Mapping[str, Any]]) -> list[State]:
    """The saved groups, which have the sizes of `mine`."""
    if missing := [name for name in ("state", "param_groups") if name not in state_dict]:
        raise ValueError(f"state_dict: expected state and param_groups, got no {', '.join(missing)}")
    saved: list[State] = deepcopy(state_dict["param_groups"])
    for group in saved:
        if lacking := [name for name in ("params", "lr", "betas", "weight_decay") if name not in group]:
            raise ValueError(f"param_groups: a group has no {', '.join(lacking)}")
        check_numbers(group)
    sizes, got = ([len(group["params"]) for group in groups] for groups in (mine, saved))
    if got != sizes:
        raise ValueError(f"param_groups: expected groups of {sizes} parameters, got {got}")
    return saved


def _local(entry: State, p: Tensor, what: str) -> State:
    """This process's shard of a parameter's state."""
    if is_sharded(p):
        return Layout(p, what).part(entry)
    return in_own_blocks({name: whole_of(value) for name, value in entry.items()}, p.shape, what)
