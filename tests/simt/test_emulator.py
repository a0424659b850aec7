"""The emulator catches planted faults, passes what is right, and its instructions are right.

Compiles a program out of the emulator and the cases beside it, once each in the ways that it is used.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = ["cases", "emulator", "memory_cases", "memory_faults", "primitives", "thread_faults"]
BUILDS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "ucontext": ["-O1", "-DPEFT_KERNELS_SIMT_UCONTEXT"],
}

SEEDS = range(8)

# What the report says; where it can say different things, each is seen in some order of the threads. It names
# the line that the source marks, if one is marked.
SHARED_RACE = (
    r"race: (reads|writes) byte \d+ of shared memory, which thread \d+ (read|wrote) \(\w+_faults.*no barrier"
)
GLOBAL_RACE = (
    r"race: (reads|writes) global memory that thread \d+ of block \d (read|wrote) \(\w+_faults.* nothing to"
)
UNDER_WAY = (
    r"reads byte \d+ of shared memory, where an asynchronous copy by thread \d+ \(\w+_faults.* is under way"
)
FAULTS: dict[str, str | tuple[str, ...]] = {
    "barrier_missing": SHARED_RACE,
    "overwritten_too_early": SHARED_RACE,
    "overwritten_after_shuffle": r"race: writes byte \d+ of shared memory, which thread \d+ read",
    "read_by_the_warp": r"race: writes byte 0 of shared memory, which other threads read",
    "read_by_two_warps": r"thread 0, .*: race: writes byte 0 of shared memory, which other threads read",
    "written_twice": SHARED_RACE,
    "neighbouring_bytes": r"thread 4[01], .* writes byte 40 of shared memory, which thread 4[01] wrote",
    "lane_skips_shuffle": (
        r"returned, but lanes? .* of the warp wait at shuffle_xor",
        r"shuffle_xor, but lanes? .* returned",
    ),
    "lanes_in_two_shuffles": r"shuffle, but lanes? .* of the warp wait at shuffle \(\w+_faults",
    "barrier_or_shuffle": (
        r"sync_threads, but lanes? .* wait at shuffle",
        r"shuffle, but lanes? .* wait at sync_threads",
    ),
    "barrier_skipped": (
        r"returned, but \d+ threads wait at sync_threads",
        r"sync_threads, but \d+ threads of the block returned",
    ),
    "two_barriers": r"sync_threads, but \d+ threads wait at another one \(\w+_faults",
    "copy_read_early": UNDER_WAY,
    "copy_of_last_group": UNDER_WAY,
    "copy_of_another": SHARED_RACE,
    "copy_source_changed": r"the source of an asynchronous copy changed before its wait",
    "copy_to_global": r"copy_async_16 to what is not shared memory",
    "copy_from_shared": r"copy_async_16 from shared memory",
    "copy_over_read": SHARED_RACE,
    "unaligned_load": r"misaligned load of 16 bytes at 0x",
    "out_of_bounds": r"thread 63, .*: 4 bytes at byte 256 of shared memory, which has 256",
    "below_bounds": r"thread 0, .*: 4 bytes at byte -4 of shared memory, which has 256",
    "more_than_launched": r"shared_memory\(\) of a type of 512 bytes, but launched with 256",
    "plain_pointer": r"shared memory through a plain pointer",
    "constant_in_shared": r"load_constant of shared memory",
    "atomic_in_shared": r"atomic_add_ordered in shared memory",
    "null_pointer": r"thread 12, .*: null pointer",
    "wild_pointer": r"soon after .*: segmentation fault",
    "ticket_too_early": GLOBAL_RACE,
    "ticket_after_ballot": GLOBAL_RACE,
    "ticket_by_shuffle": GLOBAL_RACE,
    "ticket_before_store": GLOBAL_RACE,
    "read_of_another_block": GLOBAL_RACE,
    "overwritten_by_another_block": r"race: writes global memory that thread \d+ of block 0 read",
    "written_by_two_blocks": GLOBAL_RACE,
    "constant_that_changes": r"race: reads global memory that thread (\d+) of block 0 wrote .*, as constant",
    "wait_for_all_blocks": r"thread 0, .*: deadlock: waits for a counter",
    "wait_by_load": r"does not wait for others in this loop",
    "lock": r"deadlock: waits for a counter",
}
# AddressSanitizer reports these itself.
CRASHES = {"plain_pointer", "wild_pointer"}

PRIMITIVES = [
    *(f"{case}_{dtype}" for case in ("widening", "narrowing", "products") for dtype in ("bf16", "fp16")),
    *(f"matrix_products_{dtype}" for dtype in ("bf16", "fp16")),
    *(f"moves_{size}" for size in (1, 2, 4, 8, 16)),
    *("bits_and_floats", "exchange", "shared_start", "copies", "banks", "orders", "launches"),
]

Run = Callable[..., str]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    """Runs a case with a seed, in the build that the test's parameter names."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp(request.param)
    csrc = HERE.parent.parent / "csrc" / "cuda"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-DPEFT_KERNELS_SIMT"]
    flags += [f"-I{HERE}", f"-I{csrc}", *BUILDS[request.param]]

    def build(target: str, *arguments: str) -> None:
        command = [compiler, *flags, *arguments, "-o", str(folder / target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: build(f"{name}.o", "-c", str(HERE / f"{name}.cpp")), SOURCES))
    build("cases", *(str(folder / f"{name}.o") for name in SOURCES), "-pthread")

    def run(case: str, seed: int = 0) -> str:
        result = subprocess.run(
            [str(folder / "cases"), case, str(seed)], capture_output=True, text=True, timeout=300, check=False
        )
        return result.stdout + result.stderr if result.returncode == 0 else f"crashed: {result.stderr}"

    return run


def marked_line(case: str) -> str:
    """Where the source says that the fault of `case` shows; empty without a mark."""
    marked = [
        f"{path.name}:{i}"
        for path in HERE.glob("*_faults.cpp")
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.endswith(f"// fault: {case}")
    ]
    assert len(marked) <= 1, f"{case}: {marked}"
    return marked[0] if marked else ""


every_build = pytest.mark.parametrize("program", BUILDS, indirect=True)
plain_build = pytest.mark.parametrize("program", ["plain"], indirect=True)


@plain_build
@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_reported(program: Run, case: str) -> None:
    wanted = FAULTS[case]
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    reports = [program(f"{case}-broken", seed).strip() for seed in SEEDS]
    for seed, report in zip(SEEDS, reports, strict=True):
        assert any(re.search(words, report) for words in wanted), report
        assert marked_line(case) in report
        assert re.search(rf"Kernel<.*{case}<true>.*, block \d+, thread \d+, .* \(seed {seed}\)$", report)
    for words in wanted:
        assert any(re.search(words, report) for report in reports), words


@every_build
@pytest.mark.parametrize("case", [*FAULTS, "global_out_of_bounds"])
def test_without_the_fault_it_is_clean(program: Run, case: str) -> None:
    for seed in SEEDS:
        assert program(f"{case}-fixed", seed).strip() == "clean"


@every_build
@pytest.mark.parametrize("case", PRIMITIVES)
def test_primitive(program: Run, case: str) -> None:
    assert program(case).strip() == "clean"


@plain_build
def test_emulator_survives_faults(program: Run) -> None:
    assert program("survive_faults").strip() == "clean"


@pytest.mark.parametrize("program", ["address"], indirect=True)
@pytest.mark.parametrize("case", ["global_out_of_bounds", *sorted(CRASHES)])
def test_address_sanitizer_sees_what_kernels_do(program: Run, case: str) -> None:
    assert "AddressSanitizer" in program(f"{case}-broken")
