"""Compiles the cases of the device primitives for every card, and runs them on the card of this machine."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from bench.gpu import sass

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BUILD = ROOT / "tests" / "gpu" / "card" / "build.sh"
PTX = ROOT / "tests" / "gpu" / "ptx"
CASES = [PTX / "cases" / f"{name}_cases.cu" for name in ("value", "matrix", "memory")]
CASES.append(ROOT / "tests" / "gpu" / "card" / "card_cases.cu")
ARCHITECTURES = (80, 90, 100, 120)
PLACES = ("thread_index", "block_index", "grid_size", "lane_index")
"""Wrappers of CUDA builtins, which need no case."""


@lru_cache(maxsize=1)
def program() -> Path:
    """Compiles the program for all architectures, unless cached."""
    tools = sass.tools()
    if isinstance(tools, str):
        pytest.skip(tools)
    known = subprocess.run([tools.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if missing := [a for a in ARCHITECTURES if f"compute_{a}\n" not in known]:
        pytest.skip(f"this nvcc compiles nothing for compute capability {missing}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    headers = [*(ROOT / "csrc" / "cuda").rglob("*.[ch]*"), *(ROOT / "csrc" / "common").glob("*.h")]
    sources = [*BUILD.parent.glob("*.*"), *CASES, *PTX.rglob("*.cuh"), *headers]
    texts = [known.encode(), *(path.read_bytes() for path in sorted(sources))]
    path = ROOT / "build" / "card" / hashlib.sha256(b"\n".join(texts)).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        command = ["bash", str(BUILD), tools.nvcc, str(unfinished), *flags]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
        unfinished.replace(path)
    return path


def run(*names: str) -> tuple[int, str]:
    done = subprocess.run([program(), *names], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_compiles_for_every_card() -> None:
    assert program().exists()


@pytest.mark.slow
def test_primitives_on_the_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    status, output = run()
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_program_reports_it() -> None:
    status, output = run()
    assert status == 3 and output.startswith("no card: ")


def wrappers(text: str) -> set[str]:
    """The names of the functions of device.cuh."""
    return set(re.findall(r"^DEVICE (?:[\w:*]+ )+?\*?(\w+)(?:<\w+>)?\(", text, re.M)) - {*PLACES}


def unnamed(functions: set[str], cases: Sequence[str]) -> list[str]:
    return sorted(name for name in functions if not any(re.search(rf"\b{name}\b", text) for text in cases))


def test_every_wrapper_has_a_case() -> None:
    functions = wrappers((ROOT / "csrc" / "cuda" / "core" / "device.cuh").read_text(encoding="utf-8"))
    assert {"shuffle_from_quad", "atomic_add_ordered", "mma", "pack2", "shared_memory", "load"} <= functions
    assert not unnamed(functions, [path.read_text(encoding="utf-8") for path in CASES])


def test_a_wrapper_without_a_case_is_found() -> None:
    text = (
        "DEVICE void f(int x) {}\ntemplate <class T>\nDEVICE T* g() {}\nDEVICE uint32_t h<bf16>(float x) {}\n"
    )
    assert wrappers(text) == {"f", "g", "h"}
    assert unnamed(wrappers(text), ["f(1)", "gh(2)", "x = h<bf16>(3)"]) == ["g"]
