"""Runs handwritten PTX kernels of a few instructions on the machine."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import ModuleType

import torch

LANES = 32
WORDS = [(0x9E3779B1 * (i + 1)) & 0xFFFFFFFF for i in range(LANES)]
"""A word for each lane, of both signs."""
SEEDS = range(8)
NOTHING = torch.zeros(1, dtype=torch.int32)
RACE, DEADLOCK = "race: ", "deadlock: waits for the mbarrier at byte"


def run(
    machine: ModuleType,
    body: str,
    target: str = "sm_80",
    words: Sequence[int] = WORDS,
    others: Sequence[int] = WORDS,
    same_writes: bool = False,
) -> list[int]:
    """Returns the value of %r0 in each lane after `body`. Lane i has words[i] in %r1, others[i] in %r30, and
    i in %r2."""
    given = torch.tensor([signed(w) for w in (*words, *others)], dtype=torch.int32)
    out = torch.zeros(LANES, dtype=torch.int32)
    text = f"""
.version 8.0
.target {target}
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out)
.maxntid 32, 1, 1
{{
  .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .b64 %rd<8>; .reg .f32 %f<8>; .reg .pred %p<8>;
  .shared .align 16 .b8 room[512];
  ld.param.u64 %rd1, [in];
  ld.param.u64 %rd2, [out];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd3, %r2, 4;
  add.s64 %rd1, %rd1, %rd3;
  add.s64 %rd2, %rd2, %rd3;
  ld.global.u32 %r1, [%rd1];
  ld.global.u32 %r30, [%rd1+128];
  mov.b32 %f1, %r1;
  mov.u32 %r0, 0;
  {body}
  st.global.u32 [%rd2], %r0;
  ret;
}}
"""
    pointers = [struct.pack("q", tensor.data_ptr()) for tensor in (given, out)]
    machine.load(text).run("kernel", (1, 1, 1), LANES, 0, pointers, same_writes)
    return [value & 0xFFFFFFFF for value in out.tolist()]


def run_block(
    machine: ModuleType,
    body: str,
    threads: int,
    given: torch.Tensor,
    outs: int,
    maps: Sequence[bytes] = (),
    blocks: int = 1,
) -> torch.Tensor:
    """Runs `body` as a kernel for sm_90a and returns `outs` words, as int32.

    It finds the address of `given` in %rd1, that of the result in %rd2, the thread in %r1, its lane in %r2,
    its warp in %r3, the addresses of 16 KiB of shared memory `room` in %r4 and of 16 mbarriers in %r5, and
    the addresses of the tensor maps from %rd30 on.
    """
    out = torch.zeros(outs, dtype=torch.int32)
    declared = "".join(f", .param .align 64 .b8 map{i}[128]" for i in range(len(maps)))
    taken = "".join(f"mov.b64 %rd29, map{i}; cvta.param.u64 %rd{30 + i}, %rd29;" for i in range(len(maps)))
    text = f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out{declared})
.maxntid {threads}, 1, 1
.minnctapersm 1
{{
  .reg .b16 %h<8>; .reg .b32 %r<200>; .reg .b64 %rd<40>; .reg .f32 %f<200>; .reg .pred %p<16>;
  .shared .align 1024 .b8 room[16384];
  .shared .align 8 .b8 barriers[128];
  ld.param.u64 %rd1, [in];
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;
  and.b32 %r2, %r1, 31;
  shr.u32 %r3, %r1, 5;
  mov.u32 %r4, room;
  mov.u32 %r5, barriers;
  {taken}
  {body}
  ret;
}}
"""
    parameters = [struct.pack("q", tensor.data_ptr()) for tensor in (given, out)] + [*maps]
    machine.load(text).run("kernel", (blocks, 1, 1), threads, 0, parameters)
    return out


def edited(body: str, *edits: tuple[str, str]) -> str:
    """`body` with each first text replaced by the second."""
    for old, new in edits:
        assert old in body, old
        body = body.replace(old, new)
    return body


def outcomes(
    machine: ModuleType, body: str, threads: int, given: torch.Tensor = NOTHING, outs: int = 1
) -> list[str]:
    """The error with each seed, empty where there is none."""
    found = []
    for seed in SEEDS:
        machine.set_seed(seed)
        try:
            run_block(machine, body, threads, given, outs)
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def report(machine: ModuleType, body: str, threads: int, given: torch.Tensor = NOTHING, outs: int = 1) -> str:
    """The errors, a line for each seed; all must fail."""
    found = outcomes(machine, body, threads, given, outs)
    assert all(found), found
    return "\n".join(found)


def wait(barrier: str, parity: str, which: int) -> str:
    """A loop until the phase of that parity has completed. `which` tells it from others in the text."""
    poll = f"mbarrier.try_wait.parity.shared::cta.b64 %p9, [{barrier}], {parity};"
    return f"{{ // {which}\nWAIT: {poll} @!%p9 bra WAIT; }}"


def signed(word: int) -> int:
    return word - (word >> 31 << 32)


def as_float(word: int) -> float:
    return float(struct.unpack("f", struct.pack("I", word & 0xFFFFFFFF))[0])


def as_word(x: float) -> int:
    return int(struct.unpack("I", struct.pack("f", x))[0])
