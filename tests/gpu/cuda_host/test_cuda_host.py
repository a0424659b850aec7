"""Kernel launches and device counters of the CUDA back end, on a fake CUDA runtime."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent.parent / "csrc" / "cuda"
CASES = re.findall(r'^    \{"(\w+)", \w+\},$', (HERE / "cases.cpp").read_text(encoding="utf-8"), re.M)


def cuda_headers() -> Path | None:
    """The headers of nvcc's toolkit; the nvcc on the path may be a wrapper script."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    command = [nvcc, "--dryrun", "probe.cu"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    match = re.search(r"^#\$ TOP=(.+)$", output, re.M)
    return Path(match[1], "include") if match else None


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns a function that runs a case and returns its output."""
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None:
        pytest.skip("no g++" if compiler is None else "no nvcc")
    target = tmp_path_factory.mktemp("cuda_host") / "cases"
    sources = [
        *(CSRC / "core" / name for name in ("card.cpp", "counters.cpp", "launch.cpp")),
        HERE / "fake_runtime.cpp",
    ]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{HERE}"]
    command += ["-isystem", str(headers), "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [str(path) for path in (*sources, HERE / "cases.cpp")]
    result = subprocess.run(
        [*command, "-o", str(target), "-pthread"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr

    def run(case: str) -> str:
        result = subprocess.run([str(target), case], capture_output=True, text=True, timeout=60, check=False)
        return result.stdout + result.stderr

    return run


@pytest.mark.parametrize("case", CASES)
def test_case(program: Callable[[str], str], case: str) -> None:
    assert program(case).strip() == "clean"


def test_there_are_cases() -> None:
    assert len(CASES) == 21


def test_collectives_are_volatile() -> None:
    """Otherwise the compiler may move one into a branch that some lanes do not take."""
    source = (CSRC / "core" / "device.cuh").read_text(encoding="utf-8")
    collectives = re.findall(r'asm( volatile)?\(\s*"(\w+\.sync\b[^"]*)', source)
    assert len(collectives) == 4 and all(volatile for volatile, _ in collectives), collectives
