"""Makes `bench` importable. At the end of the path: an installed peft_kernels takes precedence."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))


@pytest.fixture
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of a tiny weight instead of thousands."""
    from bench.lib import cases, layers

    monkeypatch.setattr(cases, "copies", lambda nbytes, contenders, cache=None: 2)
    layers.shared.cache_clear()
