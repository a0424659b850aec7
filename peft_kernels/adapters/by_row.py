"""Adapters of their own for the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import nn

from .assignment import Assignment, leave
from .manage import checked, sites
from .site import AdapterSite


class rows:
    """A context manager: inside, each row of a batch has its own adapter.

    with pk.adapters.rows(model, ["support", None, ["support", "legal"]]):
        model(**three_rows)

    It stands in for `set_active`, in this thread (and task of asyncio) alone: another thread may serve a
    batch of other adapters with the same model at the same time. Any sequence of batches may be computed
    inside, `generate` among them. Backward may come when it was left, activation checkpointing included; the
    gradient of an adapter is that of its rows. Compiled models run piece by piece inside; with
    `fullgraph=True` torch says that it cannot.

    Parameters
    ----------
    model : nn.Module
        With adapters. They may differ in all that an AdapterConfig says.
    names : sequence of (str, sequence of str or None)
        One for each row of the batch: an adapter, a stack in its order, or None. A batch of k times as many
        rows has k rows for each, side by side, as `repeat_interleave` and beams of `generate` make them.
        Rows are along a tensor's first dimension.

    Raises
    ------
    ValueError
        A name that is not there, a stack that has one twice, no names; in a forward, a batch whose rows are
        no multiple of the names'. `delete` of an adapter that an entered one names is refused.

    Notes
    -----
    Made once, it may be entered again and again, by several threads too: make it when the composition of a
    batch changes, not for each token.
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
        if self._edition != AdapterSite.edition:  # adapters have come or gone, perhaps of this model
            self._prepare()
        self._assignment.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave()
