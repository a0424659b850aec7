"""The compiled kernels of norms and rotary embedding: each tensor is read and written once, in whole vectors,
without slow arithmetic."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from bench.gpu import sass
from bench.gpu.adamw_loops import FP64, NARROW
from bench.gpu.sass import Kernel, count

TOOLS = sass.tools()
pytestmark = pytest.mark.skipif(isinstance(TOOLS, str), reason=str(TOOLS))
LOADS, STORES = (rf"{name}\.E\.(EF\.|NA\.)*128" for name in ("LDG", "STG"))
ROW = re.compile(r"RmsNorm(Backward)?<(\w+), (true|false), \d+, (8|16)>")
HALVES = re.compile(r"RotaryHalves<(\w+), (\w+), (4|8)>")
SIZES = {"float": 4, "bf16": 2, "fp16": 2}


@cache
def compiled(architecture: int) -> tuple[list[Path], list[Kernel]]:
    assert isinstance(TOOLS, sass.Tools)
    files = sass.sources(sass.SOURCES / "block")
    made = sass.compile_all(TOOLS, files, [architecture], cache=sass.CACHE)
    return [cubin.path for cubin in made], sass.read(TOOLS, made, cache=sass.CACHE)


def wanted(name: str) -> tuple[int, int] | None:
    """Bytes that a lane reads and writes on the widest path, with fp32 results, or an fp32 gradient; None for
    kernels without such a path."""
    if found := ROW.fullmatch(name):
        backward, dtype, adds, elements = found.groups()
        size, each = SIZES[dtype], int(elements)
        if backward:
            return each * (4 + 2 * size), each * size
        return each * size * (1 + (adds == "true")), each * (4 + size * (adds == "true"))
    if found := HALVES.fullmatch(name):
        size, angle, width = SIZES[found[1]], SIZES[found[2]], int(found[3])
        each = 4 * 2 * width  # of four heads, with the angles of one
        return each * size + 4 * width * angle, each * 4
    return None


def faults(kernel: Kernel) -> list[str]:
    """How a loop over rows or heads differs from what it should be."""
    if (sizes := wanted(kernel.name)) is None:
        return []
    path = kernel.main_path(rf"{LOADS}|{STORES}")
    found = [
        f"{what} {16 * count(path, pattern)} bytes a lane, expected {size}"
        for what, pattern, size in (("reads", LOADS, sizes[0]), ("writes", STORES, sizes[1]))
        if 16 * count(path, pattern) != size
    ]
    narrow, wide = count(path, NARROW), count(kernel.instructions, FP64)
    return found + [f"{narrow} accesses to single elements"] * bool(narrow) + [f"{wide} of fp64"] * bool(wide)


@pytest.mark.parametrize("architecture", sass.ARCHITECTURES, ids=lambda a: f"sm{a}")
def test_each_byte_is_moved_once_in_vectors(architecture: int) -> None:
    kernels = [kernel for kernel in compiled(architecture)[1] if wanted(kernel.name)]
    assert len(kernels) == 3 * 2 * 2 * 5 + 5
    found = [f"{kernel.name}: {fault}" for kernel in kernels for fault in faults(kernel)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("architecture", sass.ARCHITECTURES, ids=lambda a: f"sm{a}")
def test_no_slow_division_or_root(architecture: int) -> None:
    assert isinstance(TOOLS, sass.Tools)
    for path in compiled(architecture)[0]:
        command = [TOOLS.nvdisasm, "-c", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Shuffles may call: on sm_80 they have a path for diverged lanes.
        assert not re.findall(r"CALL.*(?:div|rcp|sqrt|rsq).*", listing)


def test_faults_are_reported() -> None:
    kernel = next(k for k in compiled(90)[1] if k.name == "RmsNorm<bf16, true, 256, 16>")

    def with_opcode(old: str, new: str) -> list[str]:
        code = [replace(i, opcode=re.sub(old, new, i.opcode)) for i in kernel.instructions]
        return faults(replace(kernel, instructions=code))

    assert faults(kernel) == []
    assert with_opcode(r"LDG\.E\.128", "LDG.E.64") == ["reads 0 bytes a lane, expected 64"]
    assert "writes 0 bytes a lane, expected 96" in with_opcode(r"STG\.E\.128", "STG.E.U16")
    assert with_opcode("FMUL", "DMUL")[0].endswith("of fp64")
