"""What a back end has to say about itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Backend(Protocol):
    """A set of kernels for every op of `spec`, in an op namespace of its own."""

    name: str
    namespace: str

    def load(self) -> None:
        """Make `torch.ops.<namespace>` callable. Called once, before the first op; must not raise."""

    def probe(self) -> str | None:
        """None when usable on this machine, else the reason why not."""

    def describe(self) -> str:
        """One line for `explain()`: version, instruction set, devices."""

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        """None when `op` can be served with these arguments, else the reason why not."""
