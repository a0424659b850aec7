"""When back end `triton` serves, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.backends import BACKENDS, triton

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not interpreted, as far as the back end knows; no back end is forced."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one that is new enough."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.TritonBackend().probe() == "Triton is not installed (pip install triton)"


@needs_triton
def test_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.TritonBackend().probe() == "torch finds no CUDA device here"


@needs_triton
@pytest.mark.usefixtures("card")
def test_on_an_old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert triton.TritonBackend().probe() == "Triton needs compute capability 8.0 or later"


@needs_triton
@pytest.mark.usefixtures("card")
def test_where_triton_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton._kernels(), "check_usable", fail)
    assert triton.TritonBackend().probe() == "Triton does not work here: no C compiler"


def test_the_order_on_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 64, device="cuda")
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "supports", lambda op, args: None)

    def chosen(*usable: str) -> str:
        for name in ("cuda", "triton"):
            reason = None if name in usable else "not today"
            monkeypatch.setattr(BACKENDS[name], "probe", lambda reason=reason: reason)
        return dispatch.select("dropout", (x, 0.5, x)).name

    assert chosen("cuda", "triton") == "cuda"
    assert chosen("triton") == "triton"
    assert chosen() == "reference"


CALL = """
import torch, peft_kernels as pk
x, seed = torch.arange(21.0).view(3, 7), torch.tensor(5)
want = torch.ops.peft_kernels_reference.dropout(x, 0.5, seed)
assert torch.equal(torch.ops.peft_kernels.dropout(x, 0.5, seed), want)
print(pk.explain())
"""


def forced(**environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(Path(pk.__file__).parent.parent), dispatch.ENVIRONMENT_VARIABLE: "triton"}
    command: Any = [sys.executable, "-c", CALL]
    return subprocess.run(
        command, env=os.environ | path | environment, capture_output=True, text=True, check=False
    )


@needs_triton
def test_the_environment_forces_it() -> None:
    done = forced(TRITON_INTERPRET="1")
    assert done.returncode == 0 and "forced: triton" in done.stdout, done.stderr


@needs_triton
def test_forced_where_it_cannot_serve() -> None:
    """CPU tensors, or no card at all."""
    assert "back end triton was asked for but cannot serve dropout: " in forced().stderr
