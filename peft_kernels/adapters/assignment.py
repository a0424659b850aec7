"""Which adapters serve which rows of a batch: what `rows` holds, and who finds it when."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from .adapter import BottleneckAdapter
    from .site import AdapterSite

_MOST_GROUPS = 16
_Entered = tuple[tuple["Assignment", int], ...]
"""The innermost last, each with the backward pass that it was entered in."""
_entered: ContextVar[_Entered] = ContextVar("entered", default=())
_thread = threading.local()
_lock = threading.Lock()


class Step(NamedTuple):
    """Adapters of one kind, and for each entry of an assignment the index of its one, or -1."""

    adapters: tuple[BottleneckAdapter, ...]
    entries: tuple[int, ...]


class Assignment:
    def __init__(self, sites: Sequence[AdapterSite], stacks: tuple[tuple[str, ...], ...]) -> None:
        self.sites = frozenset(sites)
        self.stacks = stacks
        self._steps: dict[AdapterSite, list[Step]] = {}
        self._groups: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}

    def enter(self) -> None:
        with _lock:
            for site in self.sites:
                site.entered.append(self)
        _entered.set((*_entered.get(), (self, _backward_pass())))
        _remembering.__enter__()

    def steps(self, site: AdapterSite) -> list[Step]:
        """One after the other. In one, no row has two adapters."""
        if site not in self._steps:
            self._steps[site] = self._steps_of([site.among(stack) for stack in self.stacks])
        return self._steps[site]

    def _steps_of(self, stacks: list[list[BottleneckAdapter]]) -> list[Step]:
        found = []
        for depth in range(max(map(len, stacks))):
            level = [stack[depth] if depth < len(stack) else None for stack in stacks]
            for kind in {adapter.reads: None for adapter in level if adapter is not None}:
                chosen = [one if one is not None and one.reads == kind else None for one in level]
                adapters = tuple(dict.fromkeys(one for one in chosen if one is not None))
                entries = tuple(-1 if one is None else adapters.index(one) for one in chosen)
                found.append(Step(adapters, entries))
        return found

    def row_group(self, step: Step, y: Tensor, where: str) -> Tensor:
        """For `multi_bottleneck`. A batch of more rows than entries has as many for each, side by side, as
        beams are.

        ValueError for a batch whose rows cannot be so.
        """
        count, entries = y.shape[0], len(step.entries)
        if count % entries:
            raise ValueError(
                f"names: expected one for each row of the batch, or for as many rows each, got {entries} for "
                f"{count} rows at {where}"
            )
        of_each = prod(y.shape[:-1]) // entries
        key = (step.entries, of_each, y.device)
        found = self._groups.get(key)
        if found is None:
            if len(self._groups) >= _MOST_GROUPS:
                self._groups.clear()
            with torch.inference_mode(False):
                found = torch.tensor(step.entries, device=y.device).repeat_interleave(of_each)
            self._groups[key] = found
        return found


def leave() -> None:
    """The innermost of this thread."""
    _remembering.__exit__()
    *outer, (assignment, _) = _entered.get()
    _entered.set(tuple(outer))
    with _lock:
        for site in assignment.sites:
            site.entered.remove(assignment)


def assignment_for(site: AdapterSite) -> Assignment | None:
    """Of the call that is running: the innermost that this thread has entered. In a recomputation, by
    activation checkpointing, that of the forward, unless it was entered in the recomputation itself."""
    inside, at = _innermost(_entered.get(), site)
    now = _backward_pass()
    return inside if now == -1 or at == now else _innermost(_unpacked(), site)[0]


def is_recomputation() -> bool:
    """Whether this recomputes what was computed with assignments."""
    return bool(_unpacked())


_Packed = tuple[Tensor, int, _Entered]


def _pack(saved: Tensor) -> _Packed:
    return saved, saved._version, _entered.get()


def _unpack(packed: _Packed) -> Tensor:
    saved, version, _thread.unpacked = packed
    _thread.in_node = _node()
    if saved._version != version:  # torch leaves that to hooks, where there are any
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.shape)} that backward needs was changed in place: expected "
            f"version {version}, got {saved._version}"
        )
    return saved


_remembering = saved_tensors_hooks(_pack, _unpack)
"""A context: what is saved in it for backward remembers the assignments.

A recomputation begins with unpacking what went into the first computation, in whatever thread it runs, and is
over before the backward of another operation begins.
"""


def _unpacked() -> _Entered:
    """For the backward of the operation that is running."""
    found: _Entered = getattr(_thread, "unpacked", ())
    return found if found and _thread.in_node == _node() else ()


def _node() -> tuple[int, int, str] | None:
    """The operation whose backward is running."""
    node = torch._C._current_autograd_node()
    return None if node is None else (_backward_pass(), node._sequence_nr(), node.name())


def _backward_pass() -> int:
    """-1 in none."""
    return torch._C._current_graph_task_id()


def _innermost(entered: _Entered, site: AdapterSite) -> tuple[Assignment | None, int]:
    return next((one for one in reversed(entered) if site in one[0].sites), (None, -1))
