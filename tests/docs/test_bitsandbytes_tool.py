"""tools/bitsandbytes_tests.py on a folder of sample tests, and the comparison of runs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import TOOLS, tool_module

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

TESTS = """
import bitsandbytes
import torch
from tests.helpers import SHAPE

def test_4bit_served():
    dense = torch.ones(SHAPE)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(dense, 64, "nf4", torch.uint8)
    assert torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", SHAPE, dense.dtype).eq(1).all()

def test_4bit_of_a_fault():
    torch.ops.bitsandbytes.quantize_4bit(torch.full(SHAPE, torch.nan), 64, "nf4", torch.uint8)

def test_other():
    raise AssertionError
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return tool_module("bitsandbytes_tests")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "bitsandbytes_tests.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_failure_with_the_kernels_is_reported(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("SHAPE = (2, 64)\n")
    (tmp_path / "test_ops.py").write_text(TESTS)
    done = run("--tests", str(tmp_path), "-n", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stock    2 passed\nenabled  1 failed, 1 passed\n" in done.stdout
    assert "pass stock, fail enabled: 1\ntests/test_ops.py::test_4bit_of_a_fault\n    failed" in done.stdout
    assert "1 dequantize_4bit by ours" in done.stdout


def test_bad_arguments_are_reported(tmp_path: Path) -> None:
    done = run("--tests", str(tmp_path))
    assert done.returncode == 2 and "--tests: expected bitsandbytes' folder of tests" in done.stderr
    (tmp_path / "helpers.py").touch()
    done = run("--tests", str(tmp_path), "test_ops.py")
    assert done.returncode == 2 and "test_ops.py: expected a file in" in done.stderr


def test_only_failures_caused_by_the_kernels_count(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    passing, failing = {"one": ("passed", "")}, {"one": ("failed", "why")}
    served, left = Counter({"gemm_4bit by ours": 1}), Counter({"gemm_4bit left to bitsandbytes": 1})
    assert tool.compare(passing, passing, served) == 0
    assert tool.compare(failing, passing, served) == 0
    assert tool.compare(failing, failing, served) == 0
    assert tool.compare(passing, failing, served) == 1
    assert tool.compare(passing, {}, served) == 1
    assert tool.compare(passing, passing, left) == 1
    assert "no call reached our kernels" in capsys.readouterr().out
