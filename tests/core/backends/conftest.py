"""A card for the tests of back end `cuda`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from card_stub import Properties, Tests, new_process

from peft_kernels.core.backends import cuda
from peft_kernels.core.backends.self_test import gemms


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The CUDA back end with a card, of a user for whom nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PEFT_KERNELS_SELF_TEST", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(cuda.CudaBackend, "_build", lambda self: "a build")
    made = new_process()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(gemms, "test", lambda *args: None)
    return made


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch, backend: Any) -> Any:
    """After the stubs of `backend`, which it replaces one of."""
    return Tests(monkeypatch)
