"""The fixture for the machine that runs PTX."""

from __future__ import annotations

from types import ModuleType

import pytest

import ptx_backend as ptx
import testing


@pytest.fixture
def machine() -> ModuleType:
    """The machine in its initial state, with the card that the environment names."""
    if (reason := testing.unavailable("ptx")) is not None:
        pytest.skip(f"ptx: {reason}")
    ptx.BACKEND.reset()
    return ptx.BACKEND.extension
