"""wgmma against the PTX ISA: fragments, matrix descriptors and layouts in shared memory, and what it demands
of its surroundings."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from ptx.by_hand import RACE, SEEDS, edited, report, run_block, wait
from ptx.wgmma_by_hand import (
    BARRIER,
    COMMIT,
    FENCE_PROXY,
    FILL,
    FIRST,
    LAYOUTS,
    ROOM,
    SPANS,
    WAIT_ALL,
    WGMMA_FENCE,
    Layout,
    accumulators,
    descriptor,
    fragments,
    initial,
    integers,
    load_fragments,
    multiply,
    place,
    results,
    store,
)

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
REGISTERS_OF_A = "{%r100, %r101, %r102, %r103}"


def one_product(
    n: int, dtype: str, a: Layout | None, b: Layout, b_at: int = 0, scales: str = "p, 1, 1"
) -> str:
    """A from registers, or at byte 8192 of shared memory; B at `b_at`."""
    operand = REGISTERS_OF_A if a is None else "%rd10"
    body = FIRST + FILL + FENCE_PROXY + BARRIER + accumulators(n) + load_fragments(100, ROOM)
    body += "" if a is None else descriptor("%rd10", 8192, a)
    body += descriptor("%rd11", b_at, b) + "setp.eq.u32 p, %r0, %r0;\n" + WGMMA_FENCE
    transposed = [layout.transposed for layout in (a, b) if layout is not None]
    body += multiply(
        n, dtype, operand, "%rd11", ", ".join((scales, *(str(int(each)) for each in transposed)))
    )
    body += COMMIT + WAIT_ALL + store(n)
    return "{ .reg .pred p; mov.u32 %r0, 0;\n" + body + "}"


def given(memory: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.cat([memory.view(torch.int32), fragments(a).reshape(-1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_b(hopper: ModuleType, name: str, dtype: str) -> None:
    n, layout = 64, LAYOUTS[name]
    a, b = integers(64, 16, DTYPES[dtype], 1), integers(n, 16, DTYPES[dtype], 2)
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, layout)
    out = run_block(hopper, one_product(n, dtype, None, layout), 128, given(memory, a), 64 * n)
    assert torch.equal(results(out, n), initial(n) + a.float() @ b.float().T)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_a(hopper: ModuleType, name: str) -> None:
    n, layout = 8, LAYOUTS[name]
    a, b = integers(64, 16, torch.bfloat16, 3), integers(n, 16, torch.bfloat16, 4)
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, LAYOUTS["128"])
    place(memory, 8192, a, layout)
    body = one_product(n, "bf16", layout, LAYOUTS["128"])
    out = run_block(hopper, body, 128, given(memory, a), 64 * n)
    assert torch.equal(results(out, n), initial(n) + a.float() @ b.float().T)


@pytest.mark.parametrize("swizzle", ["64", "128"])
def test_later_k_of_a_swizzled_row(hopper: ModuleType, swizzle: str) -> None:
    """The start moves by 32 bytes for each 16 of k; the permutation goes by the address."""
    layout, n = LAYOUTS[swizzle], 32
    columns = SPANS[swizzle] // 2
    a, b = integers(64, 16, torch.float16, 5), integers(n, columns, torch.float16, 6)
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, layout)
    for step in range(columns // 16):
        body = one_product(n, "f16", None, layout, 32 * step)
        out = run_block(hopper, body, 128, given(memory, a), 64 * n)
        expected = a.float() @ b[:, 16 * step : 16 * step + 16].float().T
        assert torch.equal(results(out, n), initial(n) + expected)


@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_widths(hopper: ModuleType, n: int) -> None:
    a, b = integers(64, 16, torch.bfloat16, 7), integers(n, 16, torch.bfloat16, 8)
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, LAYOUTS["none"])
    for seed in range(2):
        hopper.set_seed(seed)
        out = run_block(hopper, one_product(n, "bf16", None, LAYOUTS["none"]), 128, given(memory, a), 64 * n)
        assert torch.equal(results(out, n), initial(n) + a.float() @ b.float().T)


@pytest.mark.parametrize("flags,scale,sign", [("!p, 1, 1", 0, 1), ("p, -1, 1", 1, -1), ("p, 1, -1", 1, -1),
                                              ("p, -1, -1", 1, 1)])  # fmt: skip
def test_scales(hopper: ModuleType, flags: str, scale: int, sign: int) -> None:
    a, b = integers(64, 16, torch.bfloat16, 9), integers(8, 16, torch.bfloat16, 10)
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, LAYOUTS["128"])
    body = one_product(8, "bf16", None, LAYOUTS["128"], scales=flags.replace("!p", "p"))
    body = body.replace("setp.eq.u32 p", "setp.ne.u32 p") if "!p" in flags else body
    out = run_block(hopper, body, 128, given(memory, a), 512)
    assert torch.equal(results(out, 8), scale * initial(8) + sign * (a.float() @ b.float().T))


@pytest.mark.parametrize("truncates", [False, True])
def test_sums(hopper: ModuleType, truncates: bool) -> None:
    """1 plus three quarters of its last place: rounding goes up, tensor cores truncate."""
    a, b = torch.zeros(64, 16, dtype=torch.bfloat16), torch.zeros(8, 16, dtype=torch.bfloat16)
    a[0, 0], b[0, 0] = 1.5 * 2.0**-12, 2.0**-12
    a[0, 1], b[0, 1] = 1.0, 1.0
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, LAYOUTS["128"])
    body = one_product(8, "bf16", None, LAYOUTS["128"]).replace("setp.eq.u32 p", "setp.ne.u32 p")
    hopper.set_truncate_sums(truncates)
    found = results(run_block(hopper, body, 128, given(memory, a), 512), 8)[0, 0].item()
    hopper.set_truncate_sums(False)
    # Rounded in ascending k the small product comes first, and 1 + 1.5 * 2^-24 rounds to the next float.
    assert found == (1.0 if truncates else 1.0 + 2.0**-23)


# ---- What it demands ----------------------------------------------------------------------------------

N = 32
BODY = one_product(N, "bf16", None, LAYOUTS["128"])
LATER = "add.f32 %f0, %f0, 0f3F800000;"
NOT_FENCED = "that was written after the last wgmma.fence"
IN_FLIGHT = (
    r"(reads|writes) a register that wgmma \(.*\) has in flight as accumulator, with no wgmma.wait_group"
)
SHARED_WRITE = "st.shared.u32 [%r6], %r1;"
BREAKS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "no-wgmma-fence": (((WGMMA_FENCE, ""),), "before the first wgmma.fence"),
    "accumulator-written-after-it": (((WGMMA_FENCE, WGMMA_FENCE + LATER),), "an accumulator " + NOT_FENCED),
    "a-written-after-it": (((WGMMA_FENCE, WGMMA_FENCE + "add.u32 %r102, %r102, 0;"),), "A " + NOT_FENCED),
    "moved-after-it": (((WGMMA_FENCE, WGMMA_FENCE + "mov.u32 %r8, 0; mov.u32 %r102, %r8;"),),
                       "A " + NOT_FENCED),
    "no-wait": (((WAIT_ALL, ""),), IN_FLIGHT),
    "one-group-too-few": (((WAIT_ALL, "wgmma.wait_group.sync.aligned 1;"),), IN_FLIGHT),
    "no-commit": (((COMMIT, ""),), IN_FLIGHT),
    "early-read": (((WAIT_ALL, "add.f32 %f150, %f5, %f5;" + WAIT_ALL),), "add.f32 reads"),
    "early-write": (((WAIT_ALL, "mov.f32 %f5, 0f00000000;" + WAIT_ALL),), "mov.f32 writes"),
    "a-overwritten": (((WAIT_ALL, "add.u32 %r103, %r1, 1;" + WAIT_ALL),), "writes a register .* as its A"),
    "no-proxy-fence": (((FENCE_PROXY, ""),), "wrote .* without a fence.proxy.async"),
    "proxy-fence-too-late": (((FENCE_PROXY + BARRIER, BARRIER + FENCE_PROXY),),
                             "without a fence.proxy.async"),
    "no-barrier": (((BARRIER, ""),), RACE),
    "overwritten": (((WAIT_ALL, SHARED_WRITE + WAIT_ALL),), "race: writes byte"),
    "overwritten-after-a-barrier": (((WAIT_ALL, BARRIER + SHARED_WRITE + WAIT_ALL),), "race: writes byte"),
    "different-descriptors": (((WGMMA_FENCE, WGMMA_FENCE + "cvt.u64.u32 %rd12, %r3;"
                               "add.s64 %rd11, %rd11, %rd12;"),), "with different descriptors of B"),
    "a-warp-goes-elsewhere": (((WGMMA_FENCE, WGMMA_FENCE + "setp.eq.u32 %p1, %r3, 2; @%p1 bra END2;"),
                               (WAIT_ALL, "END2:" + WAIT_ALL)), "deadlock: waits for warps|96 of 128"),
    "a-lane-goes-elsewhere": (((WGMMA_FENCE, WGMMA_FENCE + "setp.eq.u32 %p1, %r1, 70; @%p1 bra END2;"),
                               (WAIT_ALL, "END2: ret;" + WAIT_ALL)), "returned"),
}  # fmt: skip


def some(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = integers(64, 16, torch.bfloat16, 11), integers(n, 16, torch.bfloat16, 12)
    memory = torch.zeros(ROOM // 2, dtype=torch.int16)
    place(memory, 0, b, LAYOUTS["128"])
    return given(memory, a), initial(n) + a.float() @ b.float().T


def test_unedited_it_is_clean(hopper: ModuleType) -> None:
    words, expected = some()
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(results(run_block(hopper, BODY, 128, words, 64 * N), N), expected)
        late = edited(BODY, (WAIT_ALL, WAIT_ALL + BARRIER + SHARED_WRITE))
        assert torch.equal(results(run_block(hopper, late, 128, words, 64 * N), N), expected)


@pytest.mark.parametrize("name", BREAKS)
def test_broken(hopper: ModuleType, name: str) -> None:
    edits, error = BREAKS[name]
    for line in report(hopper, edited(BODY, *edits), 128, some()[0], 64 * N).splitlines():
        assert re.search(error, line), line


COPIES = "".join(
    f"add.u32 %r9, %r6, {512 * i}; add.s64 %rd7, %rd3, {512 * i}; cp.async.ca.shared.global [%r9], [%rd7], 4;"
    for i in range(ROOM // 512)
)
COPIES_DONE = "cp.async.wait_all;"
ARRIVE = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r5];"
INIT = "setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r5], 128; bar.sync 0;"
BY_COPIES = edited(BODY, (FILL, COPIES + COPIES_DONE))
BY_ARRIVALS = edited(
    BODY, (FILL + FENCE_PROXY + BARRIER, INIT + COPIES + ARRIVE + wait("%r5", "0", 0) + FENCE_PROXY)
)


@pytest.mark.parametrize("body", [BY_COPIES, BY_ARRIVALS], ids=["waits", "arrives"])
def test_b_by_cp_async(hopper: ModuleType, body: str) -> None:
    """cp.async writes through the generic proxy: the thread that waited for its copies needs a fence before
    wgmma reads them."""
    words, expected = some()
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(results(run_block(hopper, body, 128, words, 64 * N), N), expected)
    for line in report(hopper, edited(body, (FENCE_PROXY, "")), 128, words, 64 * N).splitlines():
        assert re.search("wrote .* without a fence.proxy.async", line), line


def test_fence_before_the_copies_land(hopper: ModuleType) -> None:
    body = edited(BY_COPIES, (FENCE_PROXY, ""), (COPIES_DONE, FENCE_PROXY + COPIES_DONE))
    for line in report(hopper, body, 128, some()[0], 64 * N).splitlines():
        assert re.search("wrote .* without a fence.proxy.async", line), line


FIRST_PRODUCT = multiply(N, "bf16", REGISTERS_OF_A, "%rd11", "p, 1, 1, 0") + COMMIT


def test_a_wait_covers_its_groups_alone(hopper: ModuleType) -> None:
    """Of two groups that read 4 KiB each, the first is waited for, and a thread writes where it was read."""
    second = descriptor("%rd12", 4096, LAYOUTS["128"]) + FIRST_PRODUCT.replace("%rd11", "%rd12")
    wait_one = "wgmma.wait_group.sync.aligned 1;"
    body = edited(BODY, (FIRST_PRODUCT, FIRST_PRODUCT + second + wait_one + BARRIER + SHARED_WRITE))
    words, expected = some()
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(results(run_block(hopper, body, 128, words, 64 * N), N), expected)
    later = edited(body, (SHARED_WRITE, SHARED_WRITE.replace("[%r6]", "[%r6+4096]")))
    for line in report(hopper, later, 128, words, 64 * N).splitlines():
        assert re.search("race: writes byte 4[0-9]{3}", line), line


@pytest.mark.parametrize(
    "wrong",
    [
        one_product(N, "bf16", None, LAYOUTS["128"], 128),
        one_product(N, "bf16", None, LAYOUTS["64"]._replace(stride=1024)),
        one_product(N, "bf16", None, LAYOUTS["none"]),
        one_product(N, "bf16", None, LAYOUTS["128"]._replace(stride=512)),
        one_product(N, "bf16", None, LAYOUTS["128"]._replace(transposed=True)),
    ],
    ids=["a-row-late", "another-swizzle", "no-swizzle", "another-stride", "transposed"],
)
def test_wrong_descriptors_are_seen(hopper: ModuleType, wrong: str) -> None:
    words, expected = some()
    assert not torch.equal(results(run_block(hopper, wrong, 128, words, 64 * N), N), expected)


def test_base_offset_is_not_modelled(hopper: ModuleType) -> None:
    words, _ = some()
    shifted = edited(
        BODY, ("cvt.u64.u32 %rd11, %r7;", f"cvt.u64.u32 %rd11, %r7; or.b64 %rd11, %rd11, {1 << 49};")
    )
    with pytest.raises(RuntimeError, match="a base offset in a matrix descriptor: not modelled"):
        run_block(hopper, shifted, 128, words, 64 * N)
