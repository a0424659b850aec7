"""The machine reports planted faults, accepts correct kernels, and executes instructions correctly.

The cases are the kernels of cases/*.cu, compiled into the back end `ptx`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ptx_backend as ptx

HERE = Path(__file__).resolve().parent
SEEDS = range(8)

# The text of the report; of several alternatives, each must occur for some order of threads. If the source
# marks a line, the report names it.
SHARED_RACE = (
    r"race: (reads|writes) byte \d+ of shared memory, which thread \d+ (read|wrote) \(\w+_faults.*no barrier"
)
GLOBAL_RACE = (
    r"race: (reads|writes) global memory that thread \d+ of block \d (read|wrote) \(\w+_faults.* nothing to"
)
IN_FLIGHT = (
    r"reads byte \d+ of shared memory, where an asynchronous copy by thread \d+ \(\w+_faults.* is in flight"
)
SHARED_AS_GLOBAL = r"the address of shared memory used as one of global memory"
UNWRITTEN = r"reads byte \d+ of shared memory, which was not written"
FAULTS: dict[str, str | tuple[str, ...]] = {
    "barrier_missing": SHARED_RACE,
    "overwritten_too_early": SHARED_RACE,
    "overwritten_after_shuffle": r"race: writes byte \d+ of shared memory, which thread \d+ read",
    "read_by_the_warp": r"race: writes byte 0 of shared memory, which other threads read",
    "read_by_two_warps": r"thread 0, .*: race: writes byte 0 of shared memory, which other threads read",
    "written_twice": SHARED_RACE,
    "neighbouring_bytes": r"thread 4[01], .* writes byte 40 of shared memory, which thread 4[01] wrote",
    "lane_skips_shuffle": r"returned, but lanes 0, 2, .* of the warp wait at shfl.sync.bfly.b32 \(\w+_faults",
    "lanes_in_two_shuffles": r"shfl.sync.idx.b32, but lanes 0, 1, .* wait at shfl.sync.bfly.b32 \(\w+_faults",
    "mask_without_the_lane": r"thread (16|48), .*: shfl.sync.idx.b32 by lanes that are not in its mask",
    "barrier_or_shuffle": r"shfl.sync.idx.b32, but lanes 0, 2, .* wait at a barrier \(\w+_faults",
    "barrier_skipped": r"thread 40, .*: returned, but (8|40) threads wait at a barrier \(\w+_faults",
    "two_barriers": r"barrier.sync, but 32 threads wait at another one \(\w+_faults",
    "copy_read_early": IN_FLIGHT,
    "copy_of_last_group": IN_FLIGHT,
    "copy_of_another": (SHARED_RACE, UNWRITTEN),
    "copy_source_changed": r"the source of an asynchronous copy changed before its wait",
    "copy_to_global": r"this is not the address of shared memory",
    "copy_from_shared": SHARED_AS_GLOBAL,
    "copy_over_read": SHARED_RACE,
    "unaligned_load": r"misaligned load of 16 bytes at 0x",
    "out_of_bounds": r"thread 63, .*: 4 bytes at byte 256 of shared memory, which has 256",
    "below_bounds": r"thread 0, .*: 4 bytes at byte (-4|4294967292) of shared memory, which has 256",
    "read_before_written": UNWRITTEN,
    "constant_in_shared": SHARED_AS_GLOBAL,
    "atomic_in_shared": SHARED_AS_GLOBAL,
    "null_pointer": r"thread 12, .*: null pointer",
    "wild_pointer": r"segmentation fault",
    "global_out_of_bounds": r"thread 63, .*: segmentation fault",
    "ticket_too_early": GLOBAL_RACE,
    "ticket_after_ballot": GLOBAL_RACE,
    "ticket_by_shuffle": GLOBAL_RACE,
    "ticket_before_store": GLOBAL_RACE,
    "relaxed_ticket": GLOBAL_RACE,
    "read_of_another_block": GLOBAL_RACE,
    "overwritten_by_another_block": r"race: writes global memory that thread \d+ of block 0 read",
    "written_by_two_blocks": GLOBAL_RACE,
    "constant_that_changes": r"race: reads global memory that thread (\d+) of block 0 wrote .*, as constant",
    "wait_for_all_blocks": r"thread 0, .*: deadlock: waits for a counter",
    "wait_by_load": GLOBAL_RACE,
    "lock": r"deadlock: waits for a counter",
}


@pytest.fixture
def machine(machine: ModuleType) -> Iterator[ModuleType]:
    machine.set_report_unwritten(True)
    yield machine
    machine.set_report_unwritten(False)
    machine.set_seed(0)


def report(machine: ModuleType, case: str, seed: int = 0) -> str:
    machine.set_seed(seed)
    try:
        machine.run_case(case)
    except RuntimeError as error:
        return str(error)
    return "clean"


def marked_line(case: str) -> str:
    """The line that the source marks for the fault of `case`; empty without a mark."""
    marked = [
        f"{path.name}:{i}"
        for path in (HERE / "cases").glob("*_faults.cu")
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.endswith(f"// fault: {case}")
    ]
    assert len(marked) <= 1, f"{case}: {marked}"
    return marked[0] if marked else ""


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_reported(machine: ModuleType, case: str) -> None:
    wanted = FAULTS[case]
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    reports = [report(machine, f"{case}-broken", seed) for seed in SEEDS]
    for seed, words in zip(SEEDS, reports, strict=True):
        assert any(re.search(pattern, words) for pattern in wanted), words
        assert marked_line(case) in words
        assert re.search(rf"{case}<.*block \d+, .* \(seed {seed}\)$", words), words
    for pattern in wanted:
        assert any(re.search(pattern, words) for words in reports), pattern
    for fixed in ("copy_read_early-fixed", "ticket_too_early-fixed"):
        assert report(machine, fixed) == "clean", "state left behind by a fault"


def test_every_case_is_tested(machine: ModuleType) -> None:
    planted = {name.removesuffix("-broken") for name in machine.cases() if name.endswith("-broken")}
    assert planted == {*FAULTS}


@pytest.mark.parametrize("case", FAULTS)
def test_without_the_fault_it_is_clean(machine: ModuleType, case: str) -> None:
    for seed in SEEDS:
        assert report(machine, f"{case}-fixed", seed) == "clean"


PLAIN = [
    *(
        f"{case}_{dtype}"
        for case in ("widening", "narrowing", "products", "matrix")
        for dtype in ("bf16", "fp16")
    ),
    *(f"moves_{size}" for size in (1, 2, 4, 8, 16)),
    *("matrix_tf32", "tf32_is_truncated", "bits", "floats", "approximations", "exchange", "copies", "tables"),
    *("launches", "banks", "orders", "sticky_errors"),
]


@pytest.mark.parametrize("case", PLAIN)
def test_case(machine: ModuleType, case: str) -> None:
    assert report(machine, case) == "clean"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sums_are_truncated_if_enabled(machine: ModuleType, dtype: str) -> None:
    case = f"sum_is_truncated_{dtype}"
    try:
        machine.set_truncate_sums(True)
        assert report(machine, case) == "clean"
        machine.set_truncate_sums(False)
        assert report(machine, case) == "expected: a truncated sum"
    finally:
        ptx.BACKEND.reset()
