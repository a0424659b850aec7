"""A machine with a card, for tests of bench/gpu_check.sh."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from machine_stub import Stub


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Programs on the path that record their calls, and fail if a call matches a pattern."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("PEFT_KERNELS_")]:
        monkeypatch.delenv(name)

    def stub(name: str, fails: str = "nothing", run: str = "") -> Path:
        path = folder / name
        path.write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n'
            f'case "$*" in {fails}) echo "{name} failed as asked"; exit 1;; esac\n{run}\nexit 0\n'
        )
        path.chmod(0o755)
        return path

    return stub


@pytest.fixture
def machine(tmp_path: Path, stubs: Stub) -> Stub:
    """Stubs for all programs of a machine with a card; returns a function that makes a Python stub."""
    stubs(
        "nvcc", run=f'while [ $# -gt 1 ]; do [ "$1" = -o ] && cp "{tmp_path}/bin/program" "$2"; shift; done'
    )
    stubs("program")
    stubs("ninja")
    stubs("g++")
    stubs("compute-sanitizer", run='[ "$1" = --help ] && echo "  --kernel-regex"')

    def python(fails: str = "nothing", run: str = "") -> Path:
        answers = (
            'case "$*" in *get_device_capability*) echo 9.0;;'
            " *'\"amd\" if'*) echo nvidia;; *--only\\ ^wgmma\\ --list*) echo wgmma-64x64-m64-bf16;; esac"
        )
        return stubs("python-stub", fails, f"{answers}\n{run}")

    return python
