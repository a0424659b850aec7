"""The benchmark suite as on an older machine: everything is held to its instructions, or it is said."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from bench import run
from bench.lib import levels

ROOT = Path(__file__).resolve().parent.parent.parent

CHILD = """
from bench.lib import levels
levels.limit("avx2")
import torch
print(torch.backends.cpu.get_cpu_capability())
if {bitsandbytes}:
    import bitsandbytes
    print(bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu)
"""


def test_torch_and_bitsandbytes_are_held() -> None:
    there = importlib.util.find_spec("bitsandbytes") is not None
    command = [sys.executable, "-c", CHILD.format(bitsandbytes=there)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # On an older processor torch says DEFAULT, and that is what it would be held to.
    capability, *others = found.stdout.split()
    assert capability in ("AVX2", "DEFAULT")
    assert others == (["False"] if there else [])


def test_torch_that_is_imported_cannot_be_held() -> None:
    with pytest.raises(RuntimeError, match="imported already"):
        levels.limit("avx2")


def test_a_level_that_is_not_known_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--machine", "sse9"])
    assert "expected one of scalar, avx2, avx512, avx512_bf16, got sse9" in capsys.readouterr().err
