"""Pieces of handwritten kernels with wgmma, and its fragments and layouts by the PTX ISA's tables."""

from __future__ import annotations

from typing import NamedTuple

import torch

ROOM = 16384
SPANS = {"none": 16, "32": 32, "64": 64, "128": 128}
MODES = {"none": 0, "128": 1, "64": 2, "32": 3}
"""Bits 62 and 63 of a descriptor."""


class Layout(NamedTuple):
    """Where a matrix of `rows` by `columns` (along k) is."""

    swizzle: str
    transposed: bool
    leading: int
    stride: int

    def byte(self, row: int, k: int) -> int:
        """Of a 16-bit element, from the start of the matrix."""
        span = SPANS[self.swizzle]
        outer, inner = (k, row) if self.transposed else (row, k)
        if self.swizzle == "none":
            # Core matrices of 8 rows of 16 bytes: `stride` leads along rows, `leading` along k.
            return row // 8 * self.stride + k // 8 * self.leading + outer % 8 * 16 + inner % 8 * 2
        values = span // 2
        base = outer // 8 * self.stride + outer % 8 * span + inner // values * self.leading
        permuted = {"32": outer % 8 // 4, "64": outer % 8 // 2, "128": outer % 8}[self.swizzle]
        return base + (inner % values // 8 ^ permuted) * 16 + inner % 8 * 2

    def fields(self) -> int:
        """The descriptor without its start."""
        return MODES[self.swizzle] << 62 | self.stride >> 4 << 32 | self.leading >> 4 << 16


def place(memory: torch.Tensor, at: int, matrix: torch.Tensor, layout: Layout) -> None:
    bits = matrix.view(torch.int16)
    for row in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            memory[(at + layout.byte(row, k)) // 2] = bits[row, k]


def integers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small ones, so that all sums are exact."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, columns), generator=made).to(dtype)


def fragments(a: torch.Tensor) -> torch.Tensor:
    """[128 threads, 4 words] of a [64, 16]: rows g and g + 8 of the warp's 16, columns 2t.. and 2t + 8.."""
    words = torch.zeros(128, 4, 2, dtype=torch.int16)
    bits = a.view(torch.int16)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for j in range(4):
            row, k = 16 * warp + g + 8 * (j % 2), 2 * t + 8 * (j // 2)
            words[thread, j] = bits[row, k : k + 2]
    return words.view(torch.int32).reshape(128, 4)


def results(out: torch.Tensor, n: int) -> torch.Tensor:
    """[64, n] of the threads' accumulators: pairs of columns, rows g and g + 8, for every 8 columns."""
    values = out.view(torch.float32).reshape(128, n // 2)
    found = torch.zeros(64, n)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for j in range(n // 2):
            found[16 * warp + g + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * t + j % 2] = values[thread, j]
    return found


FILL = "".join(
    f"ld.global.u32 %r10, [%rd3+{512 * i}]; st.shared.u32 [%r6+{512 * i}], %r10;" for i in range(ROOM // 512)
)
FIRST = """mul.wide.u32 %rd4, %r1, 4; add.s64 %rd3, %rd1, %rd4; cvt.u32.u64 %r6, %rd4; add.u32 %r6, %r6, %r4;
"""
FENCE_PROXY, BARRIER = "fence.proxy.async;", "bar.sync 0;"
WGMMA_FENCE, COMMIT, WAIT_ALL = (
    "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
)  # fmt: skip


def descriptor(to: str, at: int, layout: Layout) -> str:
    return (
        f"add.u32 %r7, %r4, {at}; shr.u32 %r7, %r7, 4; cvt.u64.u32 {to}, %r7;"
        f"or.b64 {to}, {to}, {layout.fields():#x};\n"
    )


def multiply(n: int, dtype: str, a: str, b: str, flags: str) -> str:
    accumulators = ", ".join(f"%f{j}" for j in range(n // 2))
    shape = f"m64n{n}k16.f32.{dtype}.{dtype}"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{accumulators}}}, {a}, {b}, {flags};\n"


def load_fragments(first: int, at: int) -> str:
    """Four words of each thread, at byte `at` of what is given."""
    body = f"mul.wide.u32 %rd5, %r1, 16; add.s64 %rd5, %rd5, %rd1; add.s64 %rd5, %rd5, {at};"
    return body + "".join(f"ld.global.u32 %r{first + j}, [%rd5+{4 * j}];" for j in range(4))


def accumulators(n: int) -> str:
    """Accumulator j of thread i starts as i % 8 + j."""
    body = "and.b32 %r8, %r1, 7; cvt.rn.f32.u32 %f190, %r8;"
    for j in range(n // 2):
        body += f"mov.u32 %r8, {j}; cvt.rn.f32.u32 %f191, %r8; add.f32 %f{j}, %f190, %f191;"
    return body + "\n"


def initial(n: int) -> torch.Tensor:
    threads, j = torch.arange(128)[:, None] % 8, torch.arange(n // 2)[None]
    return results((threads + j).float().view(torch.int32), n)


def store(n: int) -> str:
    body = f"mul.wide.u32 %rd6, %r1, {2 * n}; add.s64 %rd6, %rd6, %rd2;"
    return body + "".join(f"st.global.f32 [%rd6+{4 * j}], %f{j};" for j in range(n // 2))


LAYOUTS = {
    "none": Layout("none", False, 128, 256),
    "none-far": Layout("none", False, 2048, 128),
    "32": Layout("32", False, 16, 256),
    "64": Layout("64", False, 16, 512),
    "128": Layout("128", False, 16, 1024),
    "none-t": Layout("none", True, 128, 256),
    "none-t-far": Layout("none", True, 2048, 128),
    "32-t": Layout("32", True, 512, 256),
    "64-t": Layout("64", True, 1024, 512),
    "128-t": Layout("128", True, 2048, 1024),
}
