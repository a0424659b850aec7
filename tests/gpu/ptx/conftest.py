"""The fixture for the machine that runs PTX."""

from __future__ import annotations

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
