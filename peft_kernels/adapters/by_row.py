"""A different adapter for each row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

from torch import nn

from .assignment import Assignment, enter, leave
from .manage import checked, sites
from .site import AdapterSite

_lock = threading.Lock()  # of the lists AdapterSite.entered


class rows:
    """Context manager in which each row of a batch uses its own adapter.

    with pk.adapters.rows(model, ["support", None, ["support", "legal"]]):
        model(**three_rows)

    It overrides `set_active` in this thread (and asyncio task) only: another thread can run a batch with
    other adapters on the same model at the same time. Any number of batches can run inside, `generate`
    included. Backward may run after the context was left, also with activation checkpointing; an adapter's
    gradient is that of its rows. Compiled models have graph breaks inside, so torch refuses `fullgraph=True`.

    Parameters
    ----------
    model : nn.Module
        A model with adapters, whose AdapterConfigs may differ.
    names : sequence of (str, sequence of str or None)
        One entry per row of the batch: an adapter, a stack in order, or None. In a batch of k times as many
        rows each entry covers k consecutive rows, as `repeat_interleave` and beam search make them. Rows are
        along the first dimension.

    Raises
    ------
    ValueError
        An unknown name, a stack with a duplicate, no names; in a forward, a batch whose number of rows is
        not a multiple of the number of names. `delete` refuses an adapter that an entered context names.

    Notes
    -----
    It can be entered repeatedly, also by several threads: create it when the composition of the batch
    changes, not for each token.
    """

    def __init__(self, model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ValueError(f"names: expected a sequence, an entry for each row of the batch, got {names!r}")
        self._model, self._names = model, tuple(names)
        self._prepare()

    def _prepare(self) -> None:
        self._edition = AdapterSite.edition
        stacks = tuple(() if name is None else checked(self._model, name) for name in self._names)
        self._assignment = Assignment(sites(self._model), stacks)

    def __enter__(self) -> None:
        if self._edition != AdapterSite.edition:  # adapters were added or deleted
            self._prepare()
        assignment = self._assignment  # another thread may prepare anew
        with _lock:
            for site in assignment.sites:
                site.entered.append(assignment)
        enter(assignment)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assignment = leave()
        with _lock:
            for site in assignment.sites:
                site.entered.remove(assignment)
