"""The machine that tests of this folder run PTX on."""

from __future__ import annotations

from types import ModuleType

import pytest

import ptx_backend as ptx
import testing


@pytest.fixture
def machine() -> ModuleType:
    """As it is at the start, on the card that the environment names."""
    if (reason := testing.unavailable("ptx")) is not None:
        pytest.skip(f"ptx: {reason}")
    ptx.BACKEND.reset()
    return ptx.BACKEND.extension
