"""Runs handwritten PTX kernels of a few instructions on the machine."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import ModuleType

import torch

LANES = 32
WORDS = [(0x9E3779B1 * (i + 1)) & 0xFFFFFFFF for i in range(LANES)]
"""A word for each lane, of both signs."""


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


def signed(word: int) -> int:
    return word - (word >> 31 << 32)


def as_float(word: int) -> float:
    return float(struct.unpack("f", struct.pack("I", word & 0xFFFFFFFF))[0])


def as_word(x: float) -> int:
    return int(struct.unpack("I", struct.pack("f", x))[0])
