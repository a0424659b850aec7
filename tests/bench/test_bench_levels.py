"""`--machine`: torch and the peers are limited to an older instruction set, or an error says why not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_torch_and_bitsandbytes_are_limited() -> None:
    there = importlib.util.find_spec("bitsandbytes") is not None
    command = [sys.executable, "-c", CHILD.format(bitsandbytes=there)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # DEFAULT on an older processor.
    capability, *others = found.stdout.split()
    assert capability in ("AVX2", "DEFAULT")
    assert others == (["False"] if there else [])


def test_torch_cannot_be_limited_once_imported() -> None:
    with pytest.raises(RuntimeError, match="already imported"):
        levels.limit("avx2")


def test_an_unknown_level_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--machine", "sse9"])
    assert "expected one of scalar, avx2, avx512, avx512_bf16, got sse9" in capsys.readouterr().err
