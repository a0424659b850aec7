"""A GEMM of one warp that copies boxes into a ring and a warpgroup that multiplies them, with faults."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from ptx.by_hand import SEEDS, edited, run_block, wait
from ptx.test_bulk_copies import BF16
from ptx.wgmma_by_hand import (
    COMMIT,
    LAYOUTS,
    WAIT_ALL,
    WGMMA_FENCE,
    descriptor,
    fragments,
    integers,
    load_fragments,
    multiply,
    results,
    store,
)

TILES, WIDTH = 5, 64
FULL, EMPTY = ("%r5", "%r5+8"), ("%r5+16", "%r5+24")


def ring() -> str:
    body = "mov.u32 %r0, 0; setp.eq.u32 %p4, %r0, %r0; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r2, 0;\n"
    body += "".join(f"@%p1 mbarrier.init.shared::cta.b64 [{each}], 1;" for each in (*FULL, *EMPTY))
    body += (
        "@%p1 fence.mbarrier_init.release.cluster; bar.sync 0; setp.eq.u32 %p3, %r3, 4; @%p3 bra PRODUCER;\n"
    )
    body += "".join(f"mov.f32 %f{j}, 0f00000000;" for j in range(WIDTH // 2))
    for tile in range(TILES):
        stage, first = tile % 2, 100 + 16 * (tile % 2)
        body += f"\n{wait(FULL[stage], str(tile // 2 % 2), 2 * tile)}\n"
        for step in range(4):
            body += load_fragments(first + 4 * step, 2048 * (4 * tile + step))
        body += WGMMA_FENCE
        for step in range(4):
            a = "{" + ", ".join(f"%r{first + 4 * step + j}" for j in range(4)) + "}"
            body += descriptor("%rd11", 8192 * stage + 32 * step, LAYOUTS["128"])
            body += multiply(WIDTH, "bf16", a, "%rd11", "%p4, 1, 1, 0")
        body += f"{COMMIT} // {tile}\n"
        if tile > 0:
            body += "wgmma.wait_group.sync.aligned 1;\n"
            body += f"@%p1 mbarrier.arrive.shared::cta.b64 _, [{EMPTY[1 - stage]}];\n"
    body += WAIT_ALL + store(WIDTH) + "bra END;\nPRODUCER: @!%p2 bra END;\n"
    for tile in range(TILES):
        stage = tile % 2
        body += f"""{wait(EMPTY[stage], str((tile // 2 + 1) % 2), 2 * tile + 1)}
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [{FULL[stage]}], 8192;
        add.u32 %r9, %r4, {8192 * stage}; mov.u32 %r20, {64 * tile};
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
          [%r9], [%rd30, {{%r20, %r0}}], [{FULL[stage]}];
        """
    return body + "END:"


RING = ring()
RING_BREAKS = {
    "released-before-the-wait": (
        "wgmma.wait_group.sync.aligned 1;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r5+16];\n",
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r5+16];\nwgmma.wait_group.sync.aligned 1;\n",
    ),
    "one-group-too-few": ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    "full-not-waited-for": (wait(FULL[1], "0", 2), ""),
    "empty-not-waited-for": (wait(EMPTY[0], "0", 5), ""),
    "full-of-another-phase": (wait(FULL[0], "1", 4), wait(FULL[0], "0", 4)),
    "bytes-of-another-box": ("[%r5], 8192", "[%r5], 4096"),
    "next-box": ("mov.u32 %r20, 128", "mov.u32 %r20, 192"),
}


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = integers(64, 64 * TILES, torch.bfloat16, 13)
    b = integers(WIDTH, 64 * TILES, torch.bfloat16, 14)
    words = torch.cat(
        [fragments(a[:, k : k + 16].contiguous()).reshape(-1) for k in range(0, 64 * TILES, 16)]
    )
    return words, b, a.float() @ b.float().T


def test_ring(hopper: ModuleType) -> None:
    words, b, expected = operands()
    made = hopper.encode_tensor_map(BF16, b.data_ptr(), (64 * TILES, WIDTH), 128 * TILES, (64, WIDTH), 3)
    for seed in SEEDS:
        hopper.set_seed(seed)
        assert torch.equal(results(run_block(hopper, RING, 160, words, 64 * WIDTH, [made]), WIDTH), expected)


@pytest.mark.parametrize("name", RING_BREAKS)
def test_broken_ring(hopper: ModuleType, name: str) -> None:
    """For every order it is an error or a wrong result."""
    words, b, expected = operands()
    made = hopper.encode_tensor_map(BF16, b.data_ptr(), (64 * TILES, WIDTH), 128 * TILES, (64, WIDTH), 3)
    body = edited(RING, RING_BREAKS[name])
    for seed in SEEDS:
        hopper.set_seed(seed)
        try:
            found = run_block(hopper, body, 160, words, 64 * WIDTH, [made])
        except RuntimeError as error:
            assert re.search("race: |deadlock: |in flight|arrivals at", str(error)), error
            assert name != "next-box"
        else:
            assert name == "next-box"
            assert not torch.equal(results(found, WIDTH), expected)
