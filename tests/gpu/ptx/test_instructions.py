"""Single instructions of the machine against the PTX ISA, in handwritten PTX: behaviour that no kernel test
distinguishes."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch

from ptx.by_hand import LANES, WORDS, as_float, as_word, run, signed


def quotient(a: int, b: int) -> int:
    return int(Fraction(a, b))


EACH: dict[str, tuple[str, Any]] = {
    "div": ("div.s32 %r0, %r1, 7;", lambda w, i: quotient(signed(w), 7)),
    "div-by-zero": ("div.u32 %r0, %r1, 0;", lambda w, i: 0xFFFFFFFF),
    "rem": ("rem.s32 %r0, %r1, 7;", lambda w, i: signed(w) - 7 * quotient(signed(w), 7)),
    "shr-signed": ("shr.s32 %r0, %r1, 40;", lambda w, i: -(w >> 31)),
    "shl-all": ("add.u32 %r3, %r2, 10; shl.b32 %r0, %r1, %r3;", lambda w, i: w << (i + 10)),
    "bfe-signed": ("bfe.s32 %r0, %r1, 5, 6;", lambda w, i: (w >> 5 & 31) - (w >> 5 & 32)),
    "bfe-beyond": ("bfe.s32 %r0, %r1, 28, 9;", lambda w, i: signed(w) >> 28),
    "bfi": ("bfi.b32 %r0, %r1, %r2, 8, 5;", lambda w, i: (i & ~0x1F00) | (w & 31) << 8),
    "brev": ("brev.b32 %r0, %r1;", lambda w, i: int(f"{w:032b}"[::-1], 2)),
    "clz": ("clz.b32 %r0, %r1;", lambda w, i: 32 - w.bit_length()),
    "popc": ("popc.b32 %r0, %r1;", lambda w, i: w.bit_count()),
    "mul-hi": ("mul.hi.s32 %r0, %r1, %r1;", lambda w, i: signed(w) ** 2 >> 32),
    "prmt-sign": ("prmt.b32 %r0, %r1, %r2, 0x4b80;", lambda w, i: (
        i << 24 | (w >> 31) * 0xFF0000 | (w >> 7 & 1) * 0xFF00 | w & 0xFF)),
    "shf": ("shf.l.wrap.b32 %r0, %r1, %r1, %r2;", lambda w, i: w << i | w >> (32 - i)),
    "selp": ("setp.lt.u32 %p1, %r2, 9; selp.b32 %r0, %r1, 5, %p1;", lambda w, i: w if i < 9 else 5),
    "guard": ("setp.gt.s32 %p1, %r1, 0; @!%p1 mov.u32 %r0, 3;", lambda w, i: 0 if signed(w) > 0 else 3),
    "blocks-out-of-order": (
        "bra $set; $use: mov.u32 %r10, 7; add.s32 %r0, %r10, 1; add.s32 %r0, %r0, %r12; bra $end;"
        " $set: mov.u32 %r12, %r2; bra $use; $end:", lambda w, i: i + 8),
    "setp-nan": ("setp.ltu.f32 %p1, 0f7FC00000, %f1; selp.b32 %r0, 1, 0, %p1;", lambda w, i: 1),
    "cvt-part": ("cvt.s64.s32 %rd4, %r1; cvt.s64.s32 %rd5, %rd4; cvt.u32.u64 %r0, %rd5;", lambda w, i: w),
    "cvt-clamp": ("cvt.rzi.u32.f32 %r0, 0fC0A00000;", lambda w, i: 0),
    "cvt-sat": ("cvt.sat.f32.f32 %f2, %f1; mov.b32 %r0, %f2;", lambda w, i: as_word(
        min(max(as_float(w), 0.0), 1.0))),
    "shfl-up": ("shfl.sync.up.b32 %r0, %r1, 3, 0, -1;", lambda w, i: WORDS[i - 3 if i >= 3 else i]),
    "shfl-down": ("shfl.sync.down.b32 %r0|%p1, %r1, 3, 31, -1; @!%p1 mov.u32 %r0, 1;",
                  lambda w, i: WORDS[i + 3] if i < 29 else 1),
    "shfl-clamp": ("shfl.sync.idx.b32 %r0, %r1, 9, 0x1804, -1;", lambda w, i: WORDS[i // 8 * 8 + 1]),
    "shfl-out": ("shfl.sync.idx.b32 %r0, %r1, 5, 0x1804, -1;", lambda w, i: w),
    "lanes-before": ("mov.u32 %r0, %lanemask_lt;", lambda w, i: (1 << i) - 1),
    "redux": ("redux.sync.max.s32 %r0, %r1, -1;", lambda w, i: max(map(signed, WORDS))),
    "vote": ("setp.lt.u32 %p1, %r2, 9; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r0, 1, 2, %p2;",
             lambda w, i: 2),
    "ballot-part": ("setp.lt.u32 %p1, %r2, 9; setp.lt.u32 %p2, %r2, 30;"
                    "@%p1 vote.sync.ballot.b32 %r0, %p2, 0x1ff;", lambda w, i: 0x1FF if i < 9 else 0),
    "branches-meet": ("setp.lt.u32 %p1, %r2, 9; @%p1 bra OTHER; add.u32 %r0, %r0, 2; OTHER:"
                      "vote.sync.ballot.b32 %r3, %p1, -1; add.u32 %r0, %r0, %r3;",
                      lambda w, i: 0x1FF + (0 if i < 9 else 2)),
    "local-names": ("{ .reg .b32 %r1; mov.u32 %r1, 4; add.u32 %r0, %r1, %r2; }", lambda w, i: i + 4),
}  # fmt: skip
"""A body, and the expected result of lane i with word w."""


@pytest.mark.parametrize("case", EACH)
def test_result_of_each_lane(machine: ModuleType, case: str) -> None:
    body, expected = EACH[case]
    assert run(machine, body) == [expected(w, i) & 0xFFFFFFFF for i, w in enumerate(WORDS)]


@pytest.mark.parametrize("rounding", ["rm", "rp"])
def test_directed_rounding(machine: ModuleType, rounding: str) -> None:
    """The float next to the exact result, on the side of the rounding."""
    for a, c in ((1.1, 0.3), (-2.7, 1e-9), (3.3, -1e9), (1e-20, 1.0), (2.0, 4.0)):
        body = f"fma.{rounding}.f32 %f2, 0f{as_word(a):08X}, 0f3F8CCCCD, 0f{as_word(c):08X};"
        found = as_float(run(machine, body + "mov.b32 %r0, %f2;")[0])
        exact = Fraction(as_float(as_word(a))) * Fraction(as_float(0x3F8CCCCD)) + Fraction(
            as_float(as_word(c))
        )
        beyond = torch.nextafter(
            torch.tensor(found), torch.tensor(math.inf if rounding == "rm" else -math.inf)
        )
        if rounding == "rm":
            assert Fraction(found) <= exact < Fraction(beyond.item())
        else:
            assert Fraction(beyond.item()) < exact <= Fraction(found)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(machine: ModuleType, transposed: bool) -> None:
    """Loads rows of 16 bytes from shared memory, each written by four lanes."""
    load = f"ldmatrix.sync.aligned.m8n8.x1{'.trans' if transposed else ''}.shared.b16 {{%r0}}, [%r4];"
    found = run(
        machine,
        "mov.u32 %r3, room; shl.b32 %r5, %r2, 2; add.u32 %r5, %r3, %r5; st.shared.u32 [%r5], %r1; bar.sync 0;"
        "and.b32 %r6, %r2, 7; shl.b32 %r6, %r6, 4; add.u32 %r4, %r3, %r6;" + load,
    )
    matrix = torch.tensor([half for w in WORDS for half in (w & 0xFFFF, w >> 16)]).reshape(8, 8)
    pairs = (matrix.T if transposed else matrix).reshape(LANES, 2).tolist()
    assert found == [low | high << 16 for low, high in pairs]


@pytest.mark.parametrize("target,kept", [("sm_80", 24), ("sm_90", 25)])
def test_bits_that_a_truncated_sum_keeps(machine: ModuleType, target: str, kept: int) -> None:
    """Many products next to 1, each the lowest bit that is kept, or the one below."""
    machine.set_truncate_sums(True)
    try:
        for bit in (kept, kept + 1):
            small = as_word(2.0**-bit)
            body = f"mov.b32 %r10, 0x{small:08x}; mov.b32 %r11, 0x3f800000;"
            body += "".join(f"mov.f32 %f{i}, 0f3F800000;" for i in (2, 3, 4, 5))
            body += (
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f2, %f3, %f4, %f5}, "
                "{%r10, %r10, %r10, %r10}, {%r11, %r11}, {%f2, %f3, %f4, %f5}; mov.b32 %r0, %f2;"
            )
            added = as_float(run(machine, body, target)[0]) - 1
            # sm_80 adds 4 products at a time and truncates the sum to a float after each.
            whole = 2.0**-bit * 8 if bit == kept else 0.0
            assert added == whole // 2**-23 * 2**-23
    finally:
        machine.set_truncate_sums(False)


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
