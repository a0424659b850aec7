"""Uses one thread: these models are too small for more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

for name in ("transformers", "peft"):
    pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
