"""Faults that the machine reports, in handwritten PTX: those that no kernel of cases/*.cu has."""

from __future__ import annotations

import struct
from types import ModuleType

import pytest
import torch

from ptx.by_hand import LANES, WORDS, run


def test_sync_warp_orders_its_lanes(machine: ModuleType) -> None:
    exchange = (
        "mov.u32 %r3, room; shl.b32 %r5, %r2, 2; add.u32 %r5, %r3, %r5; st.shared.u32 [%r5], %r1; {} "
        "xor.b32 %r6, %r2, 1; shl.b32 %r6, %r6, 2; add.u32 %r6, %r3, %r6; ld.shared.u32 %r0, [%r6];"
    )
    assert run(machine, exchange.format("bar.warp.sync -1;")) == [WORDS[i ^ 1] for i in range(LANES)]
    with pytest.raises(RuntimeError, match="race: reads byte"):
        run(machine, exchange.format(""))


TICKETS = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 counter, .param .u64 out)
{{
  .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<3>;
  .shared .align 4 .b8 ticket[4];
  ld.param.u64 %rd1, [counter];
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  shl.b32 %r3, %r2, 5;
  add.u32 %r3, %r3, %r1;
  mul.wide.u32 %rd3, %r3, 4;
  add.s64 %rd3, %rd2, %rd3;
  st.global.u32 [%rd3], 1;
  bar.sync 0;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra JOIN;
  {before}
  atom.global.add.u32 %r4, [%rd1], 1;
  {after}
  st.shared.u32 [ticket], %r4;
JOIN:
  bar.sync 0;
  ld.shared.u32 %r4, [ticket];
  setp.ne.u32 %p2, %r4, 2;
  @%p2 bra DONE;
  mul.wide.u32 %rd4, %r1, 4;
  add.s64 %rd4, %rd2, %rd4;
  ld.global.u32 %r5, [%rd4];
  ld.global.u32 %r6, [%rd4+128];
  ld.global.u32 %r7, [%rd4+256];
DONE:
  ret;
}}
"""


@pytest.mark.parametrize("before", ["", "membar.gl;", "fence.acq_rel.gpu;", "membar.cta;"])
@pytest.mark.parametrize("after", ["", "membar.gl;"])
def test_fences_around_a_relaxed_atomic_order_blocks(machine: ModuleType, before: str, after: str) -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    pointers = [struct.pack("q", tensor.data_ptr()) for tensor in (counter, out)]
    module = machine.load(TICKETS.format(before=before, after=after))
    if before in ("", "membar.cta;") or not after:
        with pytest.raises(RuntimeError, match="race: reads global memory"):
            module.run("kernel", (3, 1, 1), LANES, 0, pointers)
    else:
        module.run("kernel", (3, 1, 1), LANES, 0, pointers)
        assert counter.item() == 3


FAULTS = {
    "unknown": ("sin.exact.f32 %f2, %f1;", r"unsupported instruction: sin\.exact\.f32 %f2, %f1"),
    "type": ("add.s64 %rd4, %r1, %r2;", r"register of an unexpected type: add\.s64"),
    "endless": ("AGAIN: bra AGAIN;", r"endless loop: waits for nothing"),
    "inactive-lane": (
        "setp.lt.u32 %p1, %r2, 9; @%p1 shfl.sync.idx.b32 %r0, %r1, 20, 31, 0x1ff;",
        r"shfl\.sync from lane 20, which is not active",
    ),
    "beyond-parameters": ("ld.param.u64 %rd4, [out+8];", r"a load from beyond the parameters"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_fault(machine: ModuleType, case: str) -> None:
    body, words = FAULTS[case]
    with pytest.raises(RuntimeError, match=words):
        run(machine, body)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_threads_that_write_the_same(machine: ModuleType, bits: int) -> None:
    """To one address of shared memory: allowed only if enabled, and if the values are the same."""

    def store(value: str, before: str = "") -> str:
        store, load = f"st.shared.u{bits} [%r3], {value};", f"ld.shared.u{bits} %r0, [%r3];"
        return f"mov.u32 %r3, room; {before} {store} bar.sync 0; {load}"

    same, own = store("77"), store("%r1")
    after_reads = store("77", "st.shared.u32 [%r3], 77; bar.sync 0; ld.shared.u32 %r4, [%r3];")
    over_zero = store("77", "setp.eq.u32 %p1, %r2, 9; @%p1 st.shared.u32 [%r3], 0;")
    assert run(machine, same, same_writes=True) == [77] * LANES
    for body, allowed in ((same, False), (own, True), (after_reads, True), (over_zero, True)):
        with pytest.raises(RuntimeError, match="race: writes byte 0 of shared memory, which"):
            run(machine, body, same_writes=allowed)


def test_a_copy_from_below_an_address(machine: ModuleType) -> None:
    body = (
        "setp.lt.u32 %p1, %r2, 31; mov.u32 %r3, room; shl.b32 %r4, %r2, 2; add.u32 %r3, %r3, %r4;"
        "ld.param.u64 %rd4, [in]; add.s64 %rd4, %rd4, %rd3; add.s64 %rd4, %rd4, 8;"
        "cp.async.ca.shared.global [%r3], [%rd4+-8], 4; cp.async.wait_all; ld.shared.u32 %r0, [%r3];"
    )
    assert run(machine, body) == WORDS


LEFT_OVER = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry faulty(.param .u64 in)
{
  .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>;
  .shared .align 16 .b8 room[256];
  ld.param.u64 %rd1, [in];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, room;
  shl.b32 %r3, %r1, 2;
  add.u32 %r2, %r2, %r3;
  setp.lt.u32 %p1, %r1, 32;
  @!%p1 cp.async.ca.shared.global [%r2], [%rd1], 4;
  bar.sync 0;
  mov.u64 %rd2, 0;
  ld.global.u32 %r3, [%rd2];
  ret;
}
.visible .entry clean(.param .u64 in)
{
  .reg .b32 %r<4>;
  .shared .align 16 .b8 room[256];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, room;
  shl.b32 %r3, %r1, 2;
  add.u32 %r2, %r2, %r3;
  st.shared.u32 [%r2+128], %r1;
  ret;
}
"""


def test_a_fault_leaves_no_copy_in_flight(machine: ModuleType) -> None:
    """The copy belongs to a warp that the next launch does not have."""
    pointer = [struct.pack("q", torch.zeros(64, dtype=torch.int32).data_ptr())]
    module = machine.load(LEFT_OVER)
    with pytest.raises(RuntimeError, match="null pointer"):
        module.run("faulty", (1, 1, 1), 2 * LANES, 0, pointer)
    module.run("clean", (1, 1, 1), LANES, 0, pointer)
