"""Which adapters serve which rows of a batch, and which assignment applies to the call that is running."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .adapter import BottleneckAdapter

_MOST_GROUPS = 16
_Entered = tuple[tuple["Assignment", int], ...]
"""Entered assignments, innermost last, each with the id of the backward pass in which it was entered."""
_entered: ContextVar[_Entered] = ContextVar("entered", default=())
_thread = threading.local()


class Step(NamedTuple):
    """Adapters that read the same tensor, and the adapter index of each entry of an assignment, or -1."""

    adapters: tuple[BottleneckAdapter, ...]
    entries: tuple[int, ...]


class Assignment:
    """A stack of adapter names for each entry, which is one row of the batch or several consecutive ones."""

    def __init__(self, sites: Collection[nn.Module], stacks: tuple[tuple[str, ...], ...]) -> None:
        self.sites: frozenset[Any] = frozenset(sites)
        self.stacks = stacks
        self._steps: dict[nn.Module, list[Step]] = {}
        self._groups: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}

    def steps(self, site: nn.Module, among: Callable[[Sequence[str]], list[BottleneckAdapter]]) -> list[Step]:
        """Steps to run one after the other at a site; within one, a row has at most one adapter.

        `among` returns the site's adapters for a sequence of names. Cached by site.
        """
        if site not in self._steps:
            self._steps[site] = self._steps_of([among(stack) for stack in self.stacks])
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
        """The adapter index of each row of `y`, as `multi_bottleneck` takes it. Each entry may cover k
        consecutive rows, as in beam search.

        Raises ValueError unless the number of rows is a multiple of the number of entries.
        """
        count, entries = y.shape[0], len(step.entries)
        if count % entries:
            raise ValueError(
                f"names: expected one for each row of the batch, or for as many rows each, got {entries} for "
                f"{count} rows at {where}"
            )
        rows_per_entry = prod(y.shape[:-1]) // entries
        key = (step.entries, rows_per_entry, y.device)
        found = self._groups.get(key)
        if found is None:
            if len(self._groups) >= _MOST_GROUPS:
                self._groups.clear()
            with torch.inference_mode(False):
                found = torch.tensor(step.entries, device=y.device).repeat_interleave(rows_per_entry)
            self._groups[key] = found
        return found


def enter(assignment: Assignment) -> None:
    _entered.set((*_entered.get(), (assignment, _backward_pass())))
    _saved_with_assignments.__enter__()


def leave() -> Assignment:
    """Leaves the innermost assignment of this thread and returns it."""
    _saved_with_assignments.__exit__()
    *outer, (assignment, _) = _entered.get()
    _entered.set(tuple(outer))
    return assignment


def assignment_for(site: nn.Module) -> Assignment | None:
    """The assignment for the running call: the innermost one that this thread has entered. In a recomputation
    by activation checkpointing it is that of the forward, unless one was entered in the recomputation."""
    inside, at = _innermost(_entered.get(), site)
    now = _backward_pass()
    return inside if now == -1 or at == now else _innermost(_unpacked(), site)[0]


def is_recomputation() -> bool:
    """Whether a forward that ran with assignments is being recomputed."""
    return bool(_unpacked())


_Packed = tuple[Tensor, int, _Entered]


def _pack(saved: Tensor) -> _Packed:
    return saved, saved._version, _entered.get()


def _unpack(packed: _Packed) -> Tensor:
    saved, version, _thread.unpacked = packed
    _thread.in_node = _node()
    if saved._version != version:  # with hooks, torch leaves this check to them
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.shape)} that backward needs was changed in place: expected "
            f"version {version}, got {saved._version}"
        )
    return saved


_saved_with_assignments = saved_tensors_hooks(_pack, _unpack)
"""Context in which tensors saved for backward carry the assignments.

A recomputation begins by unpacking the inputs of the first computation, in any thread, and ends before the
backward of another operation begins.
"""


def _unpacked() -> _Entered:
    """Assignments unpacked by the operation whose backward is running."""
    found: _Entered = getattr(_thread, "unpacked", ())
    return found if found and _thread.in_node == _node() else ()


def _node() -> tuple[int, int, str] | None:
    """The operation whose backward is running."""
    node = torch._C._current_autograd_node()
    return None if node is None else (_backward_pass(), node._sequence_nr(), node.name())


def _backward_pass() -> int:
    """Id of the running backward pass; -1 outside of one."""
    return torch._C._current_graph_task_id()


def _innermost(entered: _Entered, site: nn.Module) -> tuple[Assignment | None, int]:
    return next((one for one in reversed(entered) if site in one[0].sites), (None, -1))
