"""Stubs of a card and of the compiled library, for tests of back end `cuda` on a machine without a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_kernels.core.backends import crossovers, cuda
from peft_kernels.core.backends.crossovers import Card, Limits
from peft_kernels.core.backends.self_test import gemms

H100 = Card("NVIDIA H100", "9.0", 132)


class Extension:
    """A compiled library that remembers the crossovers."""

    def __init__(self) -> None:
        self.table: dict[tuple[int, int], Any] = {}
        self.off: dict[Card, list[str]] = {}

    def set_kernels_off(self, card: Card, kernels: Any) -> None:
        self.off[card] = list(kernels)

    def set_limits(self, capability: int, sms: int, rows: Any, experts: Any) -> None:
        self.table[capability, sms] = Limits(rows, experts)

    def architectures(self) -> str:
        return "9.0"


class Properties:
    name, major, minor, multi_processor_count, uuid = H100.name, 9, 0, 132, "a card"


def estimate() -> Limits:
    return crossovers.estimate(H100).limits


class OnCard(torch.Tensor):
    """Says that it is on a card."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def new_process() -> Any:
    """Back end `cuda` as it starts on a machine with the card."""
    made: Any = cuda.CudaBackend()
    made._extension = Extension()
    made.cards._judge = lambda index: None
    return made


def call(backend: Any) -> Limits:
    """Calls an op on a card; returns what the library has then."""
    assert backend.supports("cast", (torch.ones(2, 3).as_subclass(OnCard),)) is None
    return backend.extension.table[90, 132]


class Tests:
    """Stands in for gemms.test: counts its calls, and finds or raises what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.result = 0, dict[str, str]()
        self.error: Exception | None = None
        monkeypatch.setattr(gemms, "test", self)

    def __call__(
        self, library: Any, ops: Any, card: Card, device: torch.device, found: dict[str, str]
    ) -> None:
        self.calls += 1
        found |= self.result
        if self.error is not None:
            raise self.error
