"""The fixture for the machine that runs PTX."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from skips import require

import ptx_backend as ptx


@pytest.fixture
def machine() -> ModuleType:
    """The machine in its initial state, with the card that the environment names."""
    require("ptx")
    ptx.BACKEND.reset()
    return ptx.BACKEND.extension


@pytest.fixture
def hopper(machine: ModuleType) -> Iterator[ModuleType]:
    """The machine as a card of compute capability 9.0."""
    machine.set_card(90, ptx.FEW, ptx.SHARED[90])
    yield machine
    machine.set_seed(0)
    ptx.BACKEND.reset()
