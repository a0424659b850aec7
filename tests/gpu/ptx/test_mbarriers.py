"""mbarriers against the PTX ISA: phases by hand, and what is reported. Planted faults in the kernels that use
them: test_wgmma_cuda.py."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from ptx.by_hand import NOTHING, RACE, SEEDS, edited, report, run_block, wait

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
