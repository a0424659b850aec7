"""The fixture that tests of benchmarks share."""

import pytest


@pytest.fixture
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of a tiny weight instead of thousands."""
    from bench.lib import cases, layers

    monkeypatch.setattr(cases, "copies", lambda nbytes, contenders, cache=None: 2)
    layers.shared.cache_clear()
