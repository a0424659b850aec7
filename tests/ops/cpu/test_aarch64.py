"""The CPU kernels for 64-bit Arm: cross-compiled, run under qemu, and disassembled. Speed is not tested.

The kernels do not use torch. The program in tests/ops/cpu/aarch64 runs each kernel of an ISA's table and
compares it with ISA scalar, or with sums in fp64.
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
ISAS = {"max": "neon_bf16", "cortex-a72": "neon"}
"""The processors that qemu emulates, and the best ISA of each."""
SOURCES = sorted(HERE.glob("*.cpp"))
CASES = [
    name
    for source in SOURCES
    for name in re.findall(r"^PEFT_KERNELS_CASE\((\w+)\)", source.read_text(encoding="utf-8"), re.M)
]


def tool(*names: str, package: str) -> str:
    """The path of the first program found; skips the test if there is none."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"no {names[0]}: it is in Debian's package {package}")
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the objects of the ISAs, compiled with setup.py's flags, and of the test program."""
    compiler = tool(f"{PREFIX}g++", package="g++-aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("aarch64")
    setup = runpy.run_path(str(ROOT / "setup.py"))
    sources = [ROOT / source for source in setup["ARM_SOURCES"]]
    wrapper = [path for path in [shutil.which("ccache")] if path]

    def compile_one(source: Path) -> None:
        # The reference need not be fast, so it is compiled quickly.
        flags = setup["HOST_FLAGS"] if source in sources else ["-O1", "-ffp-contract=off"]
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
        others = [CSRC / "isa" / "scalar.cpp", CSRC / "isa" / "dispatch.cpp"]
        list(pool.map(compile_one, [*sources, *others, *SOURCES]))
    return folder


Program = Callable[..., str]


@pytest.fixture(scope="module")
def program(objects: Path) -> Program:
    """Runs all cases on a processor, once."""
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
@pytest.mark.parametrize("cpu", ISAS)
def test_kernels(program: Program, cpu: str, case: str) -> None:
    output = program(cpu)
    # A missing case has crashed; the end of the output shows how.
    match = re.search(rf"^{case}: (.*\n(?:  .*\n)*)", output, re.M)
    assert match is not None, output[-2000:]
    assert match[1].strip() == "clean"


@pytest.mark.parametrize("cpu", ISAS)
def test_the_best_isa_is_selected(program: Program, cpu: str) -> None:
    assert program(cpu, "isa") == f"isa: {ISAS[cpu]}\n"
    assert program(cpu, "isa", isa="neon") == "isa: neon\n"
    assert program(cpu, "isa", isa="neon_bf16") == f"isa: {ISAS[cpu]}\n"
    assert program(cpu, "isa", isa="scalar") == "isa: scalar\n"
    error = "PEFT_KERNELS_CPU_ISA: expected one of scalar, neon, neon_bf16\n"
    assert program(cpu, "isa", isa="avx2") == error


def test_every_kernel_has_a_case() -> None:
    header = (CSRC / "core" / "kernel_table.h").read_text(encoding="utf-8")
    table = header.split("struct KernelTable {")[1].split("};")[0]
    kernels = re.findall(r"\(\*(\w+)\)\(", table)
    cases = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    assert len(kernels) >= 25
    missing = [kernel for kernel in kernels if not re.search(rf"\b(table|tested)\.{kernel}\(", cases)]
    assert not missing, f"tests/ops/cpu/aarch64 has no case for {missing}"


Instructions = list[tuple[int, str, str]]


def functions(object_file: Path) -> dict[str, list[Instructions]]:
    """The bodies of each function by name, as (address, opcode, operands)."""
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
    """The instructions between a backward branch and its target, if there is no such branch in between."""
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
    """The inner loops of all functions whose name contains `name`."""
    bodies = [body for key, found in functions(object_file).items() if name in key for body in found]
    assert bodies, f"{object_file.name} has no function {name}"
    return [loop for body in bodies for loop in inner_loops(body)]


@pytest.mark.parametrize(
    "isa, unit, opcode",
    [
        ("neon", "FloatsUnit", "fmla"),
        ("neon_bf16", "FloatsUnit", "fmla"),
        ("neon_bf16", "PairsUnit", "bfdot"),
    ],
)
def test_gemms_stay_in_registers(objects: Path, isa: str, unit: str, opcode: str) -> None:
    """A tile of 24 vectors of sums stays in registers, and each operand is loaded once."""
    loops = loops_of(objects / f"{isa}.cpp.o", f"packed_add_first<peft_kernels::cpu::{isa}::{unit}>")
    tiles = [loop for loop in loops if any(op == opcode for _, op, _ in loop)]
    assert len(tiles) == 4  # of one to four vectors of lanes
    for tile in tiles:
        counts = Counter(op for _, op, _ in tile)
        assert counts[opcode] == 24, tile
        assert all(".4s" in rest.split(",")[0] for _, op, rest in tile if op == opcode)
        stored = [rest for _, op, rest in tile if re.match(r"st[rpu]", op) and re.match(r"[qdsv]\d", rest)]
        # 24 sums, four vectors of lanes and the broadcast ones, one of which gcc 14 keeps on the stack.
        assert len(stored) <= 1, stored


@pytest.mark.parametrize("isa", ISAS.values())
def test_codes_are_looked_up_in_vectors(objects: Path, isa: str) -> None:
    """Quantising and dequantising use `tbl` in a loop without scalar loads."""
    file, space = objects / f"{isa}.cpp.o", "peft_kernels::cpu"
    tables = {"dequantize_run<float>": 4, "quantize_block<float>": 3}
    for half in (f"{space}::BF16", f"{space}::F16"):
        tables |= {f"dequantize_run<{half}>": 2, f"quantize_block<{half}>": 3}
    for function, count in tables.items():
        loops = [
            loop
            for loop in loops_of(file, f" {space}::{isa}::{function}(")
            if sum(op == "tbl" for _, op, _ in loop) == count
        ]
        # Other loops with as many are for the ends of a run.
        vectors = [loop for loop in loops if not any(op in ("ldrb", "ldrh", "bl") for _, op, _ in loop)]
        assert vectors, f"{function}: no vector loop with {count} tbl"
