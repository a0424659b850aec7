"""What setup.py says when the CUDA back end cannot be built. Nothing is compiled here but a probe."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

ROOT = Path(__file__).parent.parent
Setup = Callable[..., "tuple[int, str]"]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Setup:
    """Exit status and words of setup.py, on a torch with a version of CUDA or with none."""

    def run(cuda: str | None, **environment: str) -> tuple[int, str]:
        for name in [name for name in os.environ if name.startswith("PEFT_KERNELS_")]:
            monkeypatch.delenv(name)
        for name, value in ({"PEFT_KERNELS_CPU": "0"} | environment).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        # torch looks for a toolkit once, and only where it was built with CUDA itself.
        home = os.environ.get("CUDA_HOME") if cuda else None
        monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", home)
        monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
        monkeypatch.chdir(ROOT)
        status: Any = 0
        try:
            runpy.run_path("setup.py", run_name="__main__")
        except SystemExit as end:
            status = end.code
        said = "".join(capfd.readouterr())
        return (1, said + status) if isinstance(status, str) else (status or 0, said)

    return run


def toolkit(folder: Path, version: str) -> str:
    """A folder with an nvcc that only tells its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.1"\n')
    nvcc.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("wanted", ["", "1"], ids=["unset", "asked-for"])
@pytest.mark.parametrize(
    "cuda,version,words",
    [
        ("13.0", None, "nvcc was not found in .*: install the CUDA 13.0 toolkit"),
        ("13.0", "12.6", "nvcc is of CUDA 12.6, this torch needs 13.x: install that toolkit"),
        ("12.8", "13.0", "nvcc is of CUDA 13.0, this torch needs 12.4 or later"),
        ("12.4", "12.1", "nvcc is of CUDA 12.1, this torch needs 12.4 or later"),
        (None, "13.0", "is built without CUDA"),
    ],
    ids=["no-nvcc", "too-old", "too-new", "old-minor", "torch-without"],
)
def test_no_nvcc_that_fits(
    setup: Setup, tmp_path: Path, cuda: str | None, version: str | None, words: str, wanted: str
) -> None:
    home = str(tmp_path / "absent") if version is None else toolkit(tmp_path, version)
    status, said = setup(cuda, CUDA_HOME=home, PEFT_KERNELS_CUDA=wanted)
    if wanted:
        assert status != 0 and "CUDA back end was asked for, but cannot be built: " in said
    else:
        assert status == 0 and said.startswith("peft_kernels")
        # Nobody who installed a torch without CUDA misses it.
        assert ("WARNING" in said) == (cuda is not None)
    if wanted or cuda is not None:
        assert re.search(words, said), said


def test_left_out_on_request(setup: Setup, tmp_path: Path) -> None:
    status, said = setup(torch.version.cuda, CUDA_HOME=str(tmp_path), PEFT_KERNELS_CUDA="0")
    assert status == 0 and "WARNING" not in said


def test_switches_are_0_or_1(setup: Setup) -> None:
    status, said = setup(torch.version.cuda, PEFT_KERNELS_CUDA="yes")
    assert status != 0 and "PEFT_KERNELS_CUDA: expected 0 or 1, got 'yes'" in said
