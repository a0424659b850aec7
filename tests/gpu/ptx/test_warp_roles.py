"""What kernels with specialised warps use in addition to mbarriers, against the PTX ISA: barriers of some of
the warps, an elected lane, and registers that move between warpgroups."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from ptx.by_hand import NOTHING, RACE, SEEDS, edited, report, run_block

# Warps 0 and 1 exchange words by a barrier of their own; warp 2 only arrives at another one.
NAMED = """
shl.b32 %r10, %r1, 2; add.u32 %r11, %r10, %r4; cvt.u64.u32 %rd5, %r10; add.s64 %rd6, %rd2, %rd5;
mov.u32 %r14, 5;
setp.eq.u32 %p1, %r3, 2; @%p1 bra OTHER;
st.shared.u32 [%r11], %r1;
bar.sync 3, 64;
xor.b32 %r12, %r10, 128; add.u32 %r12, %r12, %r4; ld.shared.u32 %r13, [%r12];
bar.sync %r14, 96;
ld.shared.u32 %r15, [%r4+256]; add.u32 %r13, %r13, %r15;
st.global.u32 [%rd6], %r13;
bra END;
OTHER:
setp.eq.u32 %p2, %r2, 0; mov.u32 %r16, 1000;
@%p2 st.shared.u32 [%r4+256], %r16;
bar.arrive %r14, 96;
END:
"""


def test_named_barriers(hopper: ModuleType) -> None:
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert run_block(hopper, NAMED, 96, NOTHING, 64).tolist() == [1000 + (i ^ 32) for i in range(64)]


@pytest.mark.parametrize(
    "edit,errors",
    [
        (("bar.sync 3, 64;", ""), [RACE]),
        (
            ("bar.sync 3, 64", "bar.sync 3, 96"),
            ["deadlock: waits for warps that never arrive, 64 of 96 threads"],
        ),
        (("bar.sync %r14, 96", "bar.sync %r14, 64"), [RACE, "at which others wait for", "deadlock"]),
        (("bar.sync %r14, 96", "bar.sync 6, 96"), ["deadlock: waits for warps that never arrive"]),
        (("bar.arrive %r14, 96;\nEND", "END"), ["deadlock: waits for warps"]),
        (("bar.sync 3, 64", "bar.sync 3, 40"), ["a barrier of 40 threads"]),
    ],
)
def test_broken_named_barriers(hopper: ModuleType, edit: tuple[str, str], errors: list[str]) -> None:
    for line in report(hopper, edited(NAMED, edit), 96, outs=64).splitlines():
        assert any(error in line for error in errors), line


def test_elected_lane(hopper: ModuleType) -> None:
    """One lane, the same for all that ask, though not always the first."""
    leaders = set()
    body = """elect.sync %r10|%p1, -1; selp.b32 %r11, 100, 0, %p1; add.u32 %r10, %r10, %r11;
    mul.wide.u32 %rd5, %r1, 4; add.s64 %rd5, %rd5, %rd2; st.global.u32 [%rd5], %r10;"""
    for seed in SEEDS:
        hopper.set_seed(seed)
        found = run_block(hopper, body, 32, NOTHING, 32).tolist()
        leader = found[0] % 100
        assert found == [leader + 100 * (lane == leader) for lane in range(32)]
        leaders.add(leader)
    assert len(leaders) > 1


REGISTERS = """
setp.lt.u32 %p1, %r1, 128; @%p1 bra FIRST;
setmaxnreg.inc.sync.aligned.u32 232;
bra END;
FIRST:
setmaxnreg.dec.sync.aligned.u32 40;
END:
"""


def test_registers_move_between_warpgroups(hopper: ModuleType) -> None:
    """Three warpgroups have 168 registers a thread: 40 and twice 232 are as many."""
    for seed in SEEDS:
        hopper.set_seed(seed)
        run_block(hopper, REGISTERS, 384, NOTHING, 1)


@pytest.mark.parametrize(
    "edit,error",
    [
        (("dec.sync.aligned.u32 40", "dec.sync.aligned.u32 48"), "waits for 232 registers per thread"),
        (("inc.sync.aligned.u32 232", "inc.sync.aligned.u32 236"), "expected a multiple of 8"),
        (("inc.sync.aligned.u32 232", "inc.sync.aligned.u32 160"), "setmaxnreg from 168 registers to 160"),
        (("%r1, 128", "%r1, 96"), "another warp of the warpgroup waits at another instruction|deadlock"),
    ],
)
def test_registers_misused(hopper: ModuleType, edit: tuple[str, str], error: str) -> None:
    for line in report(hopper, edited(REGISTERS, edit), 384).splitlines():
        assert re.search(error, line), line


# Two blocks write 64 words each; the one that comes last by a ticket copies those of both. One thread takes
# the ticket, and barriers of 64 threads stand for that of the block.
TICKET = """
mov.u32 %r10, %ctaid.x; shl.b32 %r11, %r10, 6; add.u32 %r11, %r11, %r1; mul.wide.u32 %rd5, %r11, 4;
add.s64 %rd6, %rd2, %rd5; add.u32 %r12, %r11, 100; mul.wide.u32 %rd7, %r1, 4; add.s64 %rd7, %rd7, %rd2;
setp.ge.u32 %p1, %r1, 64; @%p1 bra END;
st.global.u32 [%rd6], %r12;
bar.sync 1, 64;
setp.eq.u32 %p2, %r1, 0;
@%p2 atom.acq_rel.gpu.global.add.u32 %r13, [%rd1], 1;
@%p2 st.shared.u32 [%r4], %r13;
bar.sync 2, 64;
ld.shared.u32 %r14, [%r4]; setp.eq.u32 %p3, %r14, 0; @%p3 bra END;
ld.global.u32 %r15, [%rd7]; st.global.u32 [%rd7+512], %r15;
ld.global.u32 %r15, [%rd7+256]; st.global.u32 [%rd7+768], %r15;
END:
"""


def copied_by_the_last(machine: ModuleType, body: str, seed: int) -> list[int]:
    machine.set_seed(seed)
    return run_block(machine, body, 96, torch.zeros(1, dtype=torch.int32), 256, blocks=2).tolist()


def test_named_barriers_reach_other_blocks(hopper: ModuleType) -> None:
    for seed in SEEDS:
        assert copied_by_the_last(hopper, TICKET, seed) == [100 + i for i in range(128)] * 2


@pytest.mark.parametrize(
    "edit,error",
    [
        (("bar.sync 1, 64;", ""), "race: reads global memory that thread"),
        (("atom.acq_rel", "atom.relaxed"), "race: reads global memory that thread"),
        (("bar.sync 2, 64;", ""), "race: "),
    ],
)
def test_broken_tickets(hopper: ModuleType, edit: tuple[str, str], error: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=error):
            copied_by_the_last(hopper, edited(TICKET, edit), seed)
