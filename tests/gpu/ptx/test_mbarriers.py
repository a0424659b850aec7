"""mbarriers against the PTX ISA: phases by hand, and a ring between warps with planted faults."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from ptx.by_hand import DEADLOCK, NOTHING, RACE, SEEDS, WORDS, edited, report, run_block, signed, wait

PHASES = (
    """
setp.ne.u32 %p1, %r1, 0; @%p1 bra REST;
mbarrier.init.shared::cta.b64 [%r5], 3;
mbarrier.arrive.shared::cta.b64 %rd5, [%r5];
mbarrier.test_wait.shared::cta.b64 %p2, [%r5], %rd5; selp.b32 %r10, 1, 0, %p2;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 1; selp.b32 %r11, 1, 0, %p2;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 0; selp.b32 %r12, 1, 0, %p2;
mbarrier.arrive.shared::cta.b64 _, [%r5], 2;
mbarrier.test_wait.shared::cta.b64 %p2, [%r5], %rd5; selp.b32 %r13, 1, 0, %p2;
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 1; selp.b32 %r14, 1, 0, %p2;
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0, 1000; selp.b32 %r15, 1, 0, %p2;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 48;
mbarrier.arrive.release.cta.shared::cta.b64 _, [%r5], 2;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 1; selp.b32 %r16, 1, 0, %p2;
mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r5], 32;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 1; selp.b32 %r17, 1, 0, %p2;
mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r5], 16;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 1; selp.b32 %r18, 1, 0, %p2;
mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r5], 16;
mbarrier.arrive.shared::cta.b64 _, [%r5], 3;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 0; selp.b32 %r19, 1, 0, %p2;
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r5], 16;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 0; selp.b32 %r20, 1, 0, %p2;
mbarrier.inval.shared::cta.b64 [%r5];
mbarrier.init.shared::cta.b64 [%r5], 1;
mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r5], 0; selp.b32 %r21, 1, 0, %p2;
"""
    + "".join(f"st.global.u32 [%rd2+{4 * i}], %r{10 + i};" for i in range(12))
    + "REST:"
)


def test_phases_by_hand(hopper: ModuleType) -> None:
    """Arrivals, expected bytes, and both kinds of tests, one thread after itself."""
    expected = [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    assert run_block(hopper, PHASES, 32, NOTHING, 12).tolist() == expected


def test_generic_addresses(hopper: ModuleType) -> None:
    """Without a space the address is generic."""
    body = PHASES.replace(".shared::cta.b64", ".b64").replace("[%r5", "[%rd9")
    convert = "cvt.u64.u32 %rd8, %r5; cvta.shared.u64 %rd9, %rd8;"
    assert torch.equal(
        run_block(hopper, convert + body, 32, NOTHING, 12), run_block(hopper, PHASES, 32, NOTHING, 12)
    )


@pytest.mark.parametrize(
    "edit,error",
    [
        (("init.shared::cta.b64 [%r5], 3", "init.shared::cta.b64 [%r5], 0"), "a count of 0"),
        (("[%r5], 2;\nmbarrier.test", "[%r5], 3;\nmbarrier.test"), r"3 arrivals at the mbarrier at byte \d+"),
        (("mbarrier.inval.shared::cta.b64 [%r5];", ""), "without mbarrier.inval"),
        (("_, [%r5], 48", "_, [%r5], 1048576"), "too many bytes"),
        (
            ("arrive.shared::cta.b64 %rd5, [%r5]", "arrive.shared::cta.b64 %rd5, [%r5+8]"),
            "no mbarrier at byte",
        ),
    ],
)
def test_misused_mbarriers(hopper: ModuleType, edit: tuple[str, str], error: str) -> None:
    for line in report(hopper, edited(PHASES, edit), 32, outs=12).splitlines():
        assert re.search(error, line), line


# Warp 0 passes six rows of 32 words through two places, on to warps 1 and 2, which add them up.
RING = f"""
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
@%p1 mbarrier.init.shared::cta.b64 [%r5+8], 1;
@%p1 mbarrier.init.shared::cta.b64 [%r5+16], 2;
@%p1 mbarrier.init.shared::cta.b64 [%r5+24], 2;
bar.sync 0;
setp.eq.u32 %p1, %r2, 0;
mov.u32 %r10, 0; mov.u32 %r20, 0;
shl.b32 %r11, %r2, 2; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd1, %rd5;
LOOP:
and.b32 %r12, %r10, 1; shr.u32 %r13, %r10, 1; and.b32 %r13, %r13, 1;
shl.b32 %r14, %r12, 3; add.u32 %r15, %r5, %r14; add.u32 %r16, %r15, 16;
shl.b32 %r17, %r12, 7; add.u32 %r17, %r17, %r4; add.u32 %r17, %r17, %r11;
setp.ne.u32 %p2, %r3, 0; @%p2 bra CONSUMER;
xor.b32 %r18, %r13, 1;
{wait("%r16", "%r18", 1)}
ld.global.u32 %r19, [%rd6]; st.shared.u32 [%r17], %r19; add.s64 %rd6, %rd6, 128;
bar.warp.sync -1;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r15];
bra NEXT;
CONSUMER:
{wait("%r15", "%r13", 2)}
ld.shared.u32 %r19, [%r17]; add.u32 %r20, %r20, %r19;
bar.warp.sync -1;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r16];
NEXT:
add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, 6; @%p3 bra LOOP;
@!%p2 bra END;
shl.b32 %r21, %r1, 2; cvt.u64.u32 %rd7, %r21; add.s64 %rd7, %rd7, %rd2; st.global.u32 [%rd7+-128], %r20;
END:
"""
ROWS = torch.tensor([signed(word) // 64 for word in WORDS] * 6, dtype=torch.int32).reshape(6, 32)
ROWS *= torch.arange(1, 7, dtype=torch.int32)[:, None]


def test_ring_between_warps(hopper: ModuleType) -> None:
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(run_block(hopper, RING, 96, ROWS, 64), ROWS.sum(0, dtype=torch.int32).repeat(2))


RING_BREAKS = {
    "no-wait-for-full": ((wait("%r15", "%r13", 2), ""),),
    "no-wait-for-empty": ((wait("%r16", "%r18", 1), ""),),
    "wrong-parity-of-full": ((wait("%r15", "%r13", 2), wait("%r15", "%r18", 2).replace("%r18", "1")),),
    "wrong-parity-of-empty": (("xor.b32 %r18, %r13, 1;", "mov.u32 %r18, %r13;"),),
    "arrives-before-the-write": (
        ("st.shared.u32 [%r17], %r19;", ""),
        ("bra NEXT;\n", "st.shared.u32 [%r17], %r19; bra NEXT;\n"),
    ),
    "lanes-not-synchronised": (("bar.warp.sync -1;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r15]",
                               "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r15]"),),
    "readers-not-synchronised": (("bar.warp.sync -1;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r16]",
                                 "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r16]"),),
    "one-reader-too-few": (("[%r5+16], 2;", "[%r5+16], 1;"),),
    "one-reader-too-many": (("[%r5+16], 2;", "[%r5+16], 3;"),),
    "init-not-synchronised": (("bar.sync 0;", ""),),
}  # fmt: skip


@pytest.mark.parametrize("name", RING_BREAKS)
def test_broken_ring(hopper: ModuleType, name: str) -> None:
    for line in report(hopper, edited(RING, *RING_BREAKS[name]), 96, ROWS, 64).splitlines():
        expected = {
            "wrong-parity-of-empty": [DEADLOCK, RACE],
            "wrong-parity-of-full": [DEADLOCK, RACE],
            "one-reader-too-many": [DEADLOCK],
            "no-wait-for-empty": [DEADLOCK, RACE],
            "one-reader-too-few": [DEADLOCK, RACE, "arrivals at the mbarrier"],
            "init-not-synchronised": [RACE, "there is no mbarrier"],
        }.get(name, [RACE])
        assert any(error in line for error in expected), line


# Thread 0 completes phase 0, writes, and arrives once of twice: waiting for phase 0 does not order the write.
HALF = f"""
setp.eq.u32 %p1, %r1, 0; setp.ne.u32 %p2, %r1, 32;
@%p1 mbarrier.init.shared::cta.b64 [%r5], 2;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r5], 2;
bar.sync 0;
@%p1 st.shared.u32 [%r4], %r1;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r5], 1;
@%p2 bra END;
{wait("%r5", "0", 1)}
ld.shared.u32 %r10, [%r4]; st.global.u32 [%rd2], %r10;
END:
"""


def test_a_phase_covers_arrivals_of_its_own(hopper: ModuleType) -> None:
    whole = edited(HALF, ("[%r5], 1;", "[%r5], 2;"), (wait("%r5", "0", 1), wait("%r5", "1", 1)))
    for seed in SEEDS:
        hopper.set_seed(seed)
        run_block(hopper, whole, 64, NOTHING, 1)
    assert all(RACE in line for line in report(hopper, HALF, 64).splitlines())


# Thread i copies word i by cp.async and arrives when it has landed; all wait, and read the next word.
COPIES = f"""
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r5], 64;
bar.sync 0;
mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd1, %rd5; shl.b32 %r10, %r1, 2; add.u32 %r11, %r4, %r10;
cp.async.ca.shared.global [%r11], [%rd6], 4;
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r5];
{wait("%r5", "0", 1)}
xor.b32 %r12, %r10, 132; add.u32 %r12, %r12, %r4; ld.shared.u32 %r13, [%r12];
add.s64 %rd7, %rd2, %rd5; st.global.u32 [%rd7], %r13;
"""


def test_arrival_after_copies(hopper: ModuleType) -> None:
    given = torch.arange(100, 164, dtype=torch.int32)
    for seed in SEEDS:
        hopper.set_seed(seed)
        found = run_block(hopper, COPIES, 64, given, 64)
        assert found.tolist() == [100 + (i ^ 33) for i in range(64)]


def test_arrival_that_counts_itself(hopper: ModuleType) -> None:
    """Without .noinc, the phase expects one arrival more until that of the copies: the thread's."""
    given = torch.arange(100, 164, dtype=torch.int32)
    arrival = "cp.async.mbarrier.arrive.shared::cta.b64 [%r5];"
    body = edited(COPIES, ("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r5];", arrival))
    both = edited(body, (arrival, arrival + " mbarrier.arrive.shared::cta.b64 _, [%r5];"))
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert run_block(hopper, both, 64, given, 64).tolist() == [100 + (i ^ 33) for i in range(64)]
    for line in report(hopper, body, 64, given, 64).splitlines():
        assert DEADLOCK in line, line


def test_copies_not_waited_for(hopper: ModuleType) -> None:
    given = torch.arange(100, 164, dtype=torch.int32)
    body = edited(COPIES, (wait("%r5", "0", 1), ""))
    for line in report(hopper, body, 64, given, 64).splitlines():
        assert "in flight" in line or RACE in line, line
    body = edited(COPIES, ("[%r5], 64;", "[%r5], 65;"))
    for line in report(hopper, body, 64, given, 64).splitlines():
        assert DEADLOCK in line, line
