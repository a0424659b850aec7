"""The CPU kernels for 64-bit Arm: cross-compiled, run under qemu, and looked at. Nothing is said of speed.

torch is not needed for that: kernels know nothing of it. tests/ops/cpu/aarch64 has a program that runs each
kernel of a level's table and compares with level scalar, or with sums in fp64.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent.parent
HERE = Path(__file__).resolve().parent / "aarch64"
CSRC = ROOT / "csrc" / "cpu"
PREFIX = "aarch64-linux-gnu-"
LEVELS = {"max": "neon_bf16", "cortex-a72": "neon"}
"""What qemu emulates, and the best level of such a processor."""
SOURCES = sorted(HERE.glob("*.cpp"))
CASES = [
    name
    for source in SOURCES
    for name in re.findall(r"^PEFT_KERNELS_CASE\((\w+)\)", source.read_text(encoding="utf-8"), re.M)
]


def tool(*names: str, package: str) -> str:
    """Where the first of some programs is; skips the test where there is none."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"no {names[0]}: it is in Debian's package {package}")
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what setup.py would compile on such a machine, by its flags, but for what needs torch;
    and with the cases."""
    compiler = tool(f"{PREFIX}g++", package="g++-aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("aarch64")
    setup = runpy.run_path(str(ROOT / "setup.py"))
    levels = [ROOT / source for source in setup["ARM_SOURCES"]]
    wrapper = [path for path in [shutil.which("ccache")] if path]

    def compile_one(source: Path) -> None:
        # What is compared with need not be fast, so its compilation may be.
        flags = setup["HOST_FLAGS"] if source in levels else ["-O1", "-ffp-contract=off"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
        command = [*wrapper, compiler, "-std=c++17", *flags, *warnings]
        made = subprocess.run(
            [*command, "-c", str(source), "-o", str(folder / f"{source.name}.o")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(compile_one, [*levels, CSRC / "isa" / "scalar.cpp", CSRC / "isa" / "isa.cpp", *SOURCES])
        )
    return folder


Program = Callable[..., str]


@pytest.fixture(scope="module")
def program(objects: Path) -> Program:
    """Runs the cases on a processor, once for each."""
    qemu = tool("qemu-aarch64", "qemu-aarch64-static", package="qemu-user")
    target = objects / "cases"
    linked = subprocess.run(
        [f"{PREFIX}g++", "-static", *map(str, sorted(objects.glob("*.o"))), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert linked.returncode == 0, linked.stderr

    @cache
    def run(cpu: str, *arguments: str, isa: str = "") -> str:
        done = subprocess.run(
            [qemu, "-cpu", cpu, str(target), *arguments],
            env={**os.environ, "PEFT_KERNELS_CPU_ISA": isa},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cpu", LEVELS)
def test_kernels(program: Program, cpu: str, case: str) -> None:
    said = program(cpu)
    # What is not there has crashed, and then the end of it tells how.
    match = re.search(rf"^{case}: (.*\n(?:  .*\n)*)", said, re.M)
    assert match is not None, said[-2000:]
    assert match[1].strip() == "clean"


@pytest.mark.parametrize("cpu", LEVELS)
def test_the_best_level_is_taken(program: Program, cpu: str) -> None:
    assert program(cpu, "level") == f"level: {LEVELS[cpu]}\n"
    assert program(cpu, "level", isa="neon") == "level: neon\n"
    assert program(cpu, "level", isa="neon_bf16") == f"level: {LEVELS[cpu]}\n"
    assert program(cpu, "level", isa="scalar") == "level: scalar\n"
    refused = "PEFT_KERNELS_CPU_ISA: expected scalar, neon or neon_bf16\n"
    assert program(cpu, "level", isa="avx2") == refused


def test_every_kernel_has_a_case() -> None:
    header = (CSRC / "isa" / "isa.h").read_text(encoding="utf-8")
    table = header.split("struct KernelTable {")[1].split("};")[0]
    kernels = re.findall(r"\(\*(\w+)\)\(", table)
    cases = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    assert len(kernels) >= 25
    missing = [kernel for kernel in kernels if not re.search(rf"\b(table|tested)\.{kernel}\(", cases)]
    assert not missing, f"tests/ops/cpu/aarch64 has no case of {missing}"


Instructions = list[tuple[int, str, str]]


def functions(object_file: Path) -> dict[str, list[Instructions]]:
    """Of each function's name the bodies that there are, as (address, opcode, operands)."""
    objdump = tool(f"{PREFIX}objdump", package="binutils-aarch64-linux-gnu")
    command = [objdump, "-dC", "--no-show-raw-insn", str(object_file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instructions]] = {}
    for part in re.split(r"^[0-9a-f]+ <(?=.*>:$)", text, flags=re.M)[1:]:
        name, _, body = part.partition(">:\n")
        lines = re.findall(r"^\s+([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", body, re.M)
        found.setdefault(name, []).append([(int(at, 16), opcode, rest) for at, opcode, rest in lines])
    return found


def inner_loops(body: Instructions) -> list[Instructions]:
    """What lies between a branch back and its target, with no such branch in between."""
    back = []
    for at, opcode, rest in body:
        target = re.search(r"\b([0-9a-f]+) <", rest)
        if target and re.match(r"b(\.|$)|cbn?z|tbn?z", opcode) and int(target[1], 16) <= at:
            back.append((int(target[1], 16), at))
    inner = [
        (first, last)
        for first, last in back
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in back)
    ]
    return [[line for line in body if first <= line[0] <= last] for first, last in inner]


def loops_of(object_file: Path, name: str) -> list[Instructions]:
    """The inner loops of all functions that have `name` in theirs."""
    bodies = [body for key, found in functions(object_file).items() if name in key for body in found]
    assert bodies, f"{object_file.name} has no function {name}"
    return [loop for body in bodies for loop in inner_loops(body)]


@pytest.mark.parametrize(
    "level, unit, opcode",
    [
        ("neon", "FloatsUnit", "fmla"),
        ("neon_bf16", "FloatsUnit", "fmla"),
        ("neon_bf16", "PairsUnit", "bfdot"),
    ],
)
def test_products_are_vectors(objects: Path, level: str, unit: str, opcode: str) -> None:
    """A register tile of 24 vectors of sums stays in registers, and what is multiplied is loaded once."""
    loops = loops_of(objects / f"{level}.cpp.o", f"packed_add_first<peft_kernels::cpu::{level}::{unit}>")
    tiles = [loop for loop in loops if any(op == opcode for _, op, _ in loop)]
    assert len(tiles) == 4  # of one to four vectors of lanes
    for tile in tiles:
        counts = Counter(op for _, op, _ in tile)
        assert counts[opcode] == 24, tile
        assert all(".4s" in rest.split(",")[0] for _, op, rest in tile if op == opcode)
        stored = [rest for _, op, rest in tile if re.match(r"st[rpu]", op) and re.match(r"[qdsv]\d", rest)]
        # 24 sums, four vectors of lanes and what is broadcast: gcc 14 keeps one of the latter on the stack.
        assert len(stored) <= 1, stored


@pytest.mark.parametrize("level", LEVELS.values())
def test_codes_are_looked_up_by_vectors(objects: Path, level: str) -> None:
    """Both ways: 16 numbers of a weight by `tbl` in a loop without a load of a single one."""
    file, space = objects / f"{level}.cpp.o", "peft_kernels::cpu"
    tables = {"dequantize_run<float>": 4, "quantize_block<float>": 3}
    for half in (f"{space}::BF16", f"{space}::F16"):
        tables |= {f"dequantize_run<{half}>": 2, f"quantize_block<{half}>": 3}
    for function, count in tables.items():
        loops = [
            loop
            for loop in loops_of(file, f" {space}::{level}::{function}(")
            if sum(op == "tbl" for _, op, _ in loop) == count
        ]
        # Others with as many are of what is left over at the ends of a run.
        vectors = [loop for loop in loops if not any(op in ("ldrb", "ldrh", "bl") for _, op, _ in loop)]
        assert vectors, f"{function}: no loop of vectors with {count} tbl"
