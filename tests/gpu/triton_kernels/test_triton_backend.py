"""When back end `triton` is used, and the reasons when it cannot be."""

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
from peft_kernels.core import dispatch
from peft_kernels.core.backends import BACKENDS
from peft_kernels.core.formats import FORMATS, LAYOUT_SHIFT
from peft_kernels.triton_kernels import backend as triton
from peft_kernels.triton_kernels.core import layouts

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRITON_INTERPRET is unset for the back end; no back end is forced."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
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
    refused = "cuda:0 has compute capability 7.5, Triton needs 8.0 or later"
    assert triton.TritonBackend().probe() == refused
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD numbers its cards differently
    assert triton._unserved(0) is None


@needs_triton
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("current", [0, 1])
def test_on_cards_that_differ(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    """Each card is examined itself, whichever is current."""
    monkeypatch.setenv("PEFT_KERNELS_SELF_TEST", "0")  # there is no card
    capabilities = [(8, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device=None: capabilities[current if device is None else device],
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(triton._kernels(), "check_usable", lambda: None)
    with monkeypatch.context() as without_card, FakeTensorMode():
        without_card.setattr(torch.cuda, "is_available", lambda: False)
        on = [torch.empty(2, 64, device=f"cuda:{index}") for index in range(2)]
    backend = triton.TritonBackend()
    assert backend.probe() is None
    old = "cuda:1 has compute capability 7.5, Triton needs 8.0 or later"
    assert backend.describe().endswith(f"cuda:0 card 0, compute capability 8.0; {old}")
    for x, reason in zip(on, (None, f"dropout: {old}"), strict=True):
        assert backend.supports("dropout", (x, 0.5, x)) == reason


@needs_triton
@pytest.mark.usefixtures("card")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A C compiler is needed at run time, and is found as by Triton."""
    monkeypatch.setattr(triton._kernels(), "check_usable", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    needs = "Triton needs a C compiler at run time, and "
    remedy = ": install one, or set CC to one"
    assert triton.TritonBackend().probe() == f"{needs}there is neither gcc nor clang{remedy}"
    monkeypatch.setattr(BACKENDS["triton"], "_asked", False)
    monkeypatch.setattr(BACKENDS["cuda"], "probe", lambda: "the card of this test is none of CUDA's")
    assert f"triton     not usable: {needs}there is neither" in pk.explain()
    monkeypatch.setenv("CC", "cc-of-mine")
    assert triton.TritonBackend().probe() == f"{needs}CC=cc-of-mine is not there{remedy}"
    for name in ("cc-of-mine", "clang"):
        compiler = tmp_path / name
        compiler.write_text("")
        compiler.chmod(0o755)
        assert triton.TritonBackend().probe() is None
        monkeypatch.delenv("CC", raising=False)


@needs_triton
@pytest.mark.usefixtures("card")
def test_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_layouts_of_every_format() -> None:
    for form in FORMATS.values():
        for blocksize in form.blocksizes:
            layouts.check_layout(form.layout(blocksize))


def test_other_layouts_are_refused() -> None:
    formats = "nf4, fp4, mxfp4, nvfp4, int4, fp8 or int8"
    refused = f"format: expected {formats}, which back end triton has kernels for, got codes "
    for codes in (6, 1 << 20):
        with pytest.raises(RuntimeError, match=f"^{refused}{codes}$"):
            layouts.check_layout(codes << LAYOUT_SHIFT | 64)
    for name, sizes, expected in (
        ("nf4", (0, 16, 48, 8192), "a power of two from 32 to 4096"),
        ("nvfp4", (0, 8, 48, 8192), "a power of two from 16 to 4096"),
        ("int4", (0, 16, 48, 8192), "a power of two from 32 to 4096"),
        ("fp8", (1, 64, 256), "128, or 0 for a scale per row"),
        ("int8", (1, 32, 256), "64, 128, or 0 for a scale per row"),
    ):
        for size in sizes:
            with pytest.raises(RuntimeError, match=f"^blocksize: expected {expected}, got {size} for codes "):
                layouts.check_layout(FORMATS[name].layout(size))


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
def test_forced_by_the_environment() -> None:
    done = forced(TRITON_INTERPRET="1")
    assert done.returncode == 0 and "forced: triton" in done.stdout, done.stderr


@needs_triton
def test_forced_where_it_is_unusable() -> None:
    """With CPU tensors, or without a card."""
    assert "back end triton is forced but cannot serve dropout: " in forced().stderr
