"""cp.async.bulk: where the bytes of a box go in shared memory, when they may be read, and what is refused."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from ptx.by_hand import DEADLOCK, SEEDS, edited, outcomes, report, run_block, wait

BF16 = 9
"""CU_TENSOR_MAP_DATA_TYPE_BFLOAT16"""

INIT = """
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = wait("%r5", "0", 1)
# The words of shared memory, to be compared.
OUT = "".join(
    f"shl.b32 %r10, %r1, 2; add.u32 %r11, %r10, {4 * 64 * i}; add.u32 %r12, %r11, %r4;"
    "ld.shared.u32 %r13, [%r12]; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd2, %rd5;"
    "st.global.u32 [%rd6], %r13;"
    for i in range(8)
)
LINEAR = f"""{INIT}
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 2048;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], 1024, [%r5];
add.u32 %r6, %r4, 1024; add.s64 %rd3, %rd1, 1024;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%rd3], 1024, [%r5];
{WAIT}
{OUT}
"""
GIVEN = torch.arange(1000, 1512, dtype=torch.int32)


def test_linear(hopper: ModuleType) -> None:
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(run_block(hopper, LINEAR, 64, GIVEN, 512), GIVEN)


BREAKS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "no-wait": (((WAIT, ""),), "in flight|race: (reads|writes)"),
    "wrong-parity": (((WAIT, wait("%r5", "1", 1)),), "in flight|race: (reads|writes)"),
    "too-few-bytes-expected": ((("[%r5], 2048", "[%r5], 1024"),), "in flight|deadlock|race: (reads|writes)"),
    "too-many-bytes-expected": ((("[%r5], 2048", "[%r5], 2064"),), DEADLOCK),
    "none-expected": ((("arrive.expect_tx.shared::cta.b64 _, [%r5], 2048",
                        "arrive.shared::cta.b64 _, [%r5]"),), "in flight|deadlock|race: (reads|writes)"),
    "overlapping": ((("%r6, %r4, 1024", "%r6, %r4, 1008"),), "in flight|race: writes"),
    "odd-size": ((("[%rd3], 1024", "[%rd3], 1000"),), "the size of a bulk copy is not a multiple of 16"),
    "odd-source": ((("%rd3, %rd1, 1024", "%rd3, %rd1, 1020"),), "the source of a bulk copy is not"),
    "odd-destination": ((("%r6, %r4, 1024", "%r6, %r4, 1032"),), "the destination of a bulk copy is not"),
    "outside-of-shared-memory": ((("%r6, %r4, 1024", "%r6, %r4, 16512"),), "16 bytes at byte 16512"),
    "init-not-fenced": ((("@%p1 fence.mbarrier_init.release.cluster;", ""),), "whose init no fence"),
    "another-barrier": ((("[%rd3], 1024, [%r5]", "[%rd3], 1024, [%r5+8]"),), "there is no mbarrier at byte"),
    "read-before": ((("bar.sync 0;\n", "bar.sync 0; ld.shared.u32 %r20, [%r4];\n"),),
                    "race: writes byte 0 of shared memory|in flight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_broken(hopper: ModuleType, name: str) -> None:
    edits, error = BREAKS[name]
    for line in report(hopper, edited(LINEAR, *edits), 64, GIVEN, 512).splitlines():
        assert re.search(error, line), line


LATE = {
    "source-changed": (((WAIT, "@%p1 st.global.u32 [%rd1+4], %r1;" + WAIT),),
                       "the source of an asynchronous copy"),
    "ends-in-flight": (((WAIT, ""), (OUT, "")), "the block returned while an asynchronous copy of thread 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_broken_unless_the_copy_is_fast(hopper: ModuleType, name: str) -> None:
    edits, error = LATE[name]
    found = outcomes(hopper, edited(LINEAR, *edits), 64, GIVEN + 0, 512)
    assert any(error in line for line in found)
    assert all(line == "" or error in line for line in found), found


TWO = f"""{INIT}
@%p1 mbarrier.init.shared::cta.b64 [%r5+8], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
add.u32 %r6, %r4, 1024; add.s64 %rd3, %rd1, 1024;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5+8], 1024;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%rd3], 1024, [%r5+8];
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 1024;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], 1024, [%r5];
{wait("%r5", "0", 2)}
{wait("%r5+8", "0", 3)}
{OUT}
"""


def test_one_barrier_does_not_stand_for_another(hopper: ModuleType) -> None:
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(run_block(hopper, TWO, 64, GIVEN, 512), GIVEN)
    for line in report(hopper, edited(TWO, (wait("%r5+8", "0", 3), "")), 64, GIVEN, 512).splitlines():
        byte = re.search(
            r"reads byte (\d+) of shared memory, (where an asynchronous|which an asynchronous)", line
        )
        assert byte is not None and int(byte[1]) >= 1024, line


def box_body(rows: int, bytes_: int, x: int, y: int, moved: str = "%r4") -> str:
    return f"""{INIT}
    mov.u32 %r20, {x}; mov.u32 %r21, {y};
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {rows * bytes_};
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
      [{moved}], [%rd30, {{%r20, %r21}}], [%r5];
    {WAIT}
    {OUT}
    """


def source(rows: int, columns: int, ld: int) -> torch.Tensor:
    """16-bit numbers with `ld` elements from row to row, padding included; none is 0."""
    return torch.arange(1, rows * ld + 1, dtype=torch.int16).reshape(rows, ld)[:, :columns]


def by_hand(given: torch.Tensor, box: tuple[int, int], x: int, y: int, swizzle: int) -> torch.Tensor:
    """2 KiB of shared memory: element (i, j) of the box is in 16-byte unit u = j / 8 of its row, which
    swizzles exchange with u ^ (i / (128 / span) % (span / 16)): with a span of 128 bytes u ^ i % 8, of 64
    bytes u ^ i / 2 % 4, of 32 bytes u ^ i / 4 % 2."""
    columns, rows = box
    memory = torch.zeros(1024, dtype=torch.int16)
    permuted = {0: lambda i: 0, 1: lambda i: i // 4 % 2, 2: lambda i: i // 2 % 4, 3: lambda i: i % 8}[swizzle]
    for i in range(rows):
        for j in range(columns):
            r, c = y + i, x + j
            inside = 0 <= r < given.shape[0] and 0 <= c < given.shape[1]
            unit = j // 8 ^ permuted(i)
            memory[i * columns + unit * 8 + j % 8] = given[r, c] if inside else 0
    return memory.view(torch.int32)


BOXES = {
    "whole-128": ((64, 16), 0, 0, 3),
    "inner-128": ((64, 16), 64, 3, 3),
    "past-the-end-128": ((64, 16), 64, 30, 3),
    "before-the-start-128": ((64, 16), -8, -5, 3),
    "outside-128": ((64, 16), 4096, -77, 3),
    "odd-column-64": ((32, 32), 5, 2, 2),
    "past-the-end-64": ((32, 32), 96, 20, 2),
    "whole-32": ((16, 64), 16, 0, 1),
    "before-the-start-32": ((16, 64), -3, -9, 1),
    "none": ((64, 16), 7, 9, 0),
    "none-narrow": ((8, 128), 101, -100, 0),
}


@pytest.mark.parametrize("name", BOXES)
def test_box(hopper: ModuleType, name: str) -> None:
    box, x, y, swizzle = BOXES[name]
    given = source(37, 105, 112)
    assert given.data_ptr() % 16 == 0
    bounds = (BF16, given.data_ptr(), (105, 37), 2 * 112, box, swizzle)
    made = hopper.encode_tensor_map(*bounds)
    expected = by_hand(given, box, x, y, swizzle)
    body = box_body(box[1], 2 * box[0], x, y)
    for seed in range(2):
        hopper.set_seed(seed)
        assert torch.equal(run_block(hopper, body, 64, given, 512, [made]), expected)


def test_a_box_narrower_than_its_swizzle_is_not_modelled(hopper: ModuleType) -> None:
    given = source(37, 105, 112)
    made = hopper.encode_tensor_map(BF16, given.data_ptr(), (105, 37), 2 * 112, (16, 64), 3)
    with pytest.raises(RuntimeError, match="narrower than its swizzle: not modelled"):
        run_block(hopper, box_body(64, 32, 0, 0), 64, given, 512, [made])


def test_bytes_out_of_bounds_count(hopper: ModuleType) -> None:
    given = source(37, 105, 112)
    made = hopper.encode_tensor_map(BF16, given.data_ptr(), (105, 37), 2 * 112, (64, 16), 3)
    body = box_body(15, 128, 64, 22)
    with pytest.raises(RuntimeError, match=r"deadlock: waits for the mbarrier .*-128 bytes|in flight|race"):
        run_block(hopper, body, 64, given, 512, [made])


def test_misaligned_box(hopper: ModuleType) -> None:
    given = source(37, 105, 112)
    made = hopper.encode_tensor_map(BF16, given.data_ptr(), (105, 37), 2 * 112, (64, 16), 3)
    body = "add.u32 %r7, %r4, 64;" + box_body(16, 128, 0, 0, "%r7")
    with pytest.raises(RuntimeError, match="destination of a bulk copy is not a multiple of 128"):
        run_block(hopper, body, 64, given, 512, [made])
    with pytest.raises(RuntimeError, match="this is not a tensor map"):
        run_block(hopper, box_body(16, 128, 0, 0), 64, given, 512, [bytes(128)])


@pytest.mark.parametrize(
    "change",
    [
        {"address": 8},
        {"stride": 216},
        {"stride": 208},
        {"box": (72, 16)},
        {"box": (64, 257)},
        {"box": (0, 16)},
        {"box": (60, 16)},
        {"sizes": (0, 37)},
        {"type_": 99},
    ],
)
def test_maps_that_the_driver_refuses(hopper: ModuleType, change: dict[str, object]) -> None:
    given = source(37, 105, 112)
    values = {"type_": BF16, "address": 0, "sizes": (105, 37), "stride": 224, "box": (64, 16), "swizzle": 3}
    hopper.encode_tensor_map(*(values | {"address": given.data_ptr()}).values())
    changed = values | change
    changed["address"] = given.data_ptr() + int(change.get("address", 0))  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: error"):
        hopper.encode_tensor_map(*changed.values())
