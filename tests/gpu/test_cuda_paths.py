"""Which path a GEMM takes on CUDA, and that every path is correct: as PTX, for several cards."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lora_cases import check_lora_linear, check_lora_linear_backward, check_nf4_linear, check_nf4_linear_dx
from lora_multi_cases import check_backward, check_forward, multi_case
from numbers_policy import dense64, pairs, short

import ptx_backend as ptx
import testing
from peft_kernels.core.formats import FORMATS

CARDS = {"A100": (80, 108, 163 << 10), "RTX-3090": (86, 82, 99 << 10), "H100": (90, 132, 227 << 10)}
NEWER = {"B200": (100, 148, 227 << 10), "RTX-5090": (120, 170, 99 << 10)}
"""Cards with their own PTX."""
FEW = 4
"""Multiprocessors of the simulated card: few, so that small cases have more tiles than multiprocessors."""

# Sizes at the edges of the kernels' tiles, and past them.
ROWS = (1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 130)
SHAPES = ((16, 64), (33, 128), (64, 320), (130, 192), (257, 64), (8, 1024), (136, 320))
REFUSED = ((33, 96), (64, 100), (7, 33))


def paths(extension: ModuleType, card: str, direction: int) -> set[str]:
    """All paths of a card's GEMMs, over many shapes."""
    return {
        extension.plan_for(m, n, k, 64, dtype, *(CARDS | NEWER)[card])[direction]
        for m in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 8192)
        for n, k in ((64, 64), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (576, 1536), (7, 33))
        for dtype in ("float32", "bfloat16", "float16")
    }


def test_unsupported_shapes_are_dequantised_in_pieces(extension: ModuleType) -> None:
    for card in CARDS.values():
        for m, n, k, blocksize, dtype in (
            (0, 4096, 4096, 64, "bfloat16"),
            (8, 4096, 4096, 64, "float32"),
            (8, 4096, 4096, 32, "bfloat16"),
            (8, 4096, 4064, 64, "bfloat16"),
            (8, 4096, 64, 128, "bfloat16"),
            (100_000, 4096, 4096, 64, "bfloat16"),
        ):
            assert extension.plan_for(m, n, k, blocksize, dtype, *card) == ("pieces", "pieces")


@pytest.mark.parametrize("card", CARDS | NEWER)
@pytest.mark.parametrize("format,blocksize", [("mxfp4", 32), ("nvfp4", 16)])
def test_scale_codes_are_fused_for_few_rows(
    extension: ModuleType, card: str, format: str, blocksize: int
) -> None:
    layout, on = FORMATS[format].layout(blocksize), (CARDS | NEWER)[card]
    size = "" if on[2] > 128 << 10 else "_narrow"
    for m, name in ((1, "small8_codes"), (8, "small8_codes"), (16, "small16_codes"), (32, "small32_codes")):
        assert extension.plan_for(m, 4096, 4096, layout, "bfloat16", *on) == (name + size, "pieces")
    for m, k, dtype in ((33, 4096, "bfloat16"), (8, 4096 + 32, "bfloat16"), (8, 4096, "float16")):
        assert extension.plan_for(m, 4096, k, layout, dtype, *on) == ("pieces", "pieces")


def lines_of(file: str) -> list[str]:
    """The lines of a file in csrc/cuda."""
    (path,) = (Path(__file__).parent.parent.parent / "csrc" / "cuda").rglob(file)
    return path.read_text(encoding="utf-8").splitlines()


def sizes(m: int, n: int, k: int, dtype: torch.dtype, i: int) -> dict[str, Any]:
    return {
        "m": m, "n": n, "k": k, "r": (3, 8, 16)[i % 3], "bs": 64 if i % 2 or k % 128 else 128,
        "base": ("nf4", "nested")[i // 2 % 2], "nested": bool(i // 2 % 2), "dtype": dtype,
        "adapter": ("fp32", "same", "mixed")[i % 3], "bias": ("none", "same", "fp32")[i // 3 % 3],
        "layout": ("contiguous", "slice")[i % 2], "needs": ("xab", "x", "xa")[i % 3],
    }  # fmt: skip


PATHS = [(card, dtype) for card in ("A100", "RTX-3090") for dtype in (torch.bfloat16, torch.float16)]
# The same kernels at other addresses of shared memory, and other kernels.
PATHS += [("H100", torch.float16), ("B200", torch.float16), ("RTX-5090", torch.bfloat16)]


@pytest.mark.parametrize("card,dtype", PATHS, ids=[f"{card}-{short(dtype)}" for card, dtype in PATHS])
def test_every_path_is_correct(extension: ModuleType, card: str, dtype: torch.dtype) -> None:
    capability, _, shared = (CARDS | NEWER)[card]
    extension.set_card(capability, FEW, shared)
    taken: tuple[set[str], set[str]] = (set(), set())
    i = 0
    for n, k in (*SHAPES, *REFUSED):
        for m in ROWS:
            i += 1
            case = sizes(m, n, k, dtype, i)
            for found, path in zip(taken, extension.plan(m, n, k, case["bs"], str(dtype)[6:]), strict=True):
                found.add(path)
            check_nf4_linear(case)
            check_nf4_linear_dx(case)
            check_lora_linear(case)
            check_lora_linear_backward(case)
    for direction in (0, 1):
        assert paths(extension, card, direction) <= taken[direction], "a path that no case of this test takes"


@pairs(
    shape=((264, 2560), (70, 10240), (1030, 128), (1032, 128)),
    card=tuple(CARDS),
    dtype=(torch.bfloat16, torch.float16),
)
def test_long_shares_of_few_rows(
    extension: ModuleType, shape: tuple[int, int], card: str, dtype: torch.dtype
) -> None:
    """A warp's share: whole chunks of groups over several tiles; slices of k, which are summed; unshared
    tiles, with an odd number of rows in the last."""
    n, k = shape
    extension.set_card(CARDS[card][0], FEW, CARDS[card][2])
    for i, m in enumerate((1, 9, 17, 8, 16, 32), 3):  # with biases of both types each
        case = sizes(m, n, k, dtype, i)
        assert extension.plan(m, n, k, case["bs"], str(dtype)[6:])[0].startswith("small")
        check_nf4_linear(case)
        check_lora_linear(case)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("format,blocksize", [("mxfp4", 32), ("nvfp4", 16)])
def test_scale_codes_on_every_path(extension: ModuleType, card: str, format: str, blocksize: int) -> None:
    """Few rows of the same shapes, and shares that are long."""
    extension.set_card(CARDS[card][0], FEW, CARDS[card][2])
    of_format = {"format": format, "bs": blocksize, "nested": False, "base": "nf4"}
    few, i = [row for row in ROWS if row <= 32], 0
    for (n, k), rows in [
        *((shape, few) for shape in SHAPES),
        ((264, 2560), (1, 9, 17)),
        ((1030, 128), (8, 32)),
    ]:
        for m in rows:
            i += 1
            layout = FORMATS[format].layout(blocksize)
            assert extension.plan(m, n, k, layout, "bfloat16")[0].startswith("small")
            case = sizes(m, n, k, torch.bfloat16, i) | of_format
            check_nf4_linear(case)
            check_lora_linear(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("adapter", ["fp32", "same"])
def test_many_ranks(extension: ModuleType, adapter: str, dtype: torch.dtype) -> None:
    """As many ranks as one launch holds for an adapter; rows are read in vectors."""
    case = sizes(17, 136, 128, dtype, 1) | {"r": 64, "adapter": adapter, "needs": "xab"}
    check_lora_linear(case)
    check_lora_linear_backward(case)


@pytest.mark.parametrize("n,k", [(768, 49152), (770, 43611)], ids=["even", "odd"])
def test_a_weight_in_several_pieces(extension: ModuleType, n: int, k: int) -> None:
    """More than 128 MB: pieces of rows in the forward, of columns in the backward."""
    case = sizes(3, n, k, torch.float32, 2) | {"layout": "contiguous"}
    assert extension.plan(3, n, k, case["bs"], "float32") == ("pieces", "pieces")
    assert extension.piece_of(n, k, 4) < n and extension.piece_of(k, n, 4) < k
    if n % 2:  # pieces of whole rows differ from other weights only in their offset
        check_nf4_linear(case)
    check_nf4_linear_dx(case)


def test_adapters_on_several_blocks_of_rows(extension: ModuleType) -> None:
    """fp32 activations of more than 16 MB, with masks and groups across the boundary of blocks."""
    case = multi_case(m=4300, k=1024, n=8, layers=1, adapters="0", dtype=torch.float32, base="dense", r=4)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("card", CARDS)
def test_order_of_threads_changes_no_bit(extension: ModuleType, card: str, seed: int) -> None:
    """Nor does uninitialised memory: counters are zero again after every call."""
    weight, of_dx = testing.nf4_weight(48, 2560), testing.nf4_weight(520, 320)
    coded = testing.nf4_weight(48, 2560, 16, False, format="nvfp4")
    x, dy = testing.tensor(70, 2560, dtype=torch.bfloat16), testing.tensor(33, 520, dtype=torch.bfloat16)

    def run() -> list[torch.Tensor]:
        ops = torch.ops.peft_kernels
        y = [ops.nf4_linear(x[:m], *weight._state.op_args, 48, None) for m in (1, 9, 17, 70)]
        y += [ops.nf4_linear(x[:m], *coded._state.op_args, 48, None) for m in (1, 9, 17)]
        return y + [ops.nf4_linear_dx(dy[:m], *of_dx._state.op_args, 320) for m in (1, 9, 17, 33)]

    extension.set_card(CARDS[card][0], FEW, CARDS[card][2])
    ptx.BACKEND.check_order(seed, run)


def test_dora_norms_use_a_kernel(extension: ModuleType) -> None:
    """For rows of whole groups of 64 codes; others are dequantised in pieces."""
    for k, has_kernel in ((64, True), (320, True), (1088, True), (8, False), (100, False)):
        weight = testing.nf4_weight(70, k, 64, True)
        a, b = testing.tensor(19, k, seed=3), testing.tensor(70, 19, seed=4)
        extension.reset_bank_counts()
        got = torch.ops.peft_kernels.dora_norm(*weight._state.op_args, a, b, 0.5)
        used = any(line.startswith("dora_norm.cuh") for line in extension.bank_counts())
        assert used is has_kernel, k
        truth = (dense64(weight) + 0.5 * b.double() @ a.double()).norm(dim=1)
        testing.assert_close(got, testing.reference_op("dora_norm")(*weight._state.op_args, a, b, 0.5), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("card", CARDS)
def test_large_gemms_have_no_bank_conflicts(extension: ModuleType, card: str, dtype: torch.dtype) -> None:
    """Except in the lookup of scales by their codes, once per group."""
    sources = {name: lines_of(f"{name}.cuh") for name in ("linear_tiles", "linear_dx", "linear_decode")}
    extension.set_card(CARDS[card][0], FEW, CARDS[card][2])
    weight, long = testing.nf4_weight(264, 320, 64, True), testing.nf4_weight(40, 2560)
    extension.reset_bank_counts()
    for w, n, k in ((weight, 264, 320), (long, 40, 2560)):
        assert extension.plan(70, n, k, 64, str(dtype)[6:])[0].startswith("tiles")
        torch.ops.peft_kernels.nf4_linear(testing.tensor(70, k, dtype=dtype), *w._state.op_args, n, None)
    for m in (8, 16, 32, 70):
        assert extension.plan(m, 264, 320, 64, str(dtype)[6:])[1] != "pieces"
        dy = testing.tensor(m, 264, dtype=dtype)
        torch.ops.peft_kernels.nf4_linear_dx(dy, *weight._state.op_args, 320)
    seen = dict.fromkeys(sources, 0)
    for site, (accesses, _, conflicts) in extension.bank_counts().items():
        name, line = Path(site.split(":")[0]).stem, int(site.split(":")[1])
        if name in sources:
            seen[name] += accesses
            code = sources[name][line - 1]
            assert conflicts == 0 or "map" in code, f"{conflicts} at {site}: {code}"
    assert all(seen.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("card", ["A100", "RTX-3090"])
@pytest.mark.parametrize(
    "path,sms,m,n,k", [("tiles256", 3, 33, 200, 3648), ("tiles128", 3, 70, 48, 2432)], ids=["one", "two"]
)
def test_tiles_that_blocks_share(
    extension: ModuleType, card: str, path: str, sms: int, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    """Three blocks share one tile, or the second has parts of two tiles; odd numbers of stages."""
    extension.set_card(CARDS[card][0], sms, CARDS[card][2])
    case = sizes(m, n, k, dtype, m) | {"bs": 64}
    assert extension.plan(m, n, k, 64, str(dtype)[6:])[0].startswith(path)
    check_nf4_linear(case)
    check_lora_linear(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("card", ["A100", "RTX-3090"])
@pytest.mark.parametrize(
    "sms,m,n,k,parts",
    [
        (2, 5, 600, 64, 1),
        (7, 16, 16, 3584, 4),
        (5, 8, 100, 960, 2),
        (11, 32, 130, 2240, 5),
        (1, 32, 70, 1600, 2),
    ],
    ids=[
        "tiles-of-a-warp",
        "blocks-of-a-tile",
        "ends-within-chunks",
        "uneven-slices",
        "more-slices-than-blocks",
    ],
)
def test_shares_of_warps(
    extension: ModuleType, card: str, sms: int, m: int, n: int, k: int, parts: int, dtype: torch.dtype
) -> None:
    """Few rows: shares of several tiles or part of one; tiles shared by several warps, blocks and slices."""
    extension.set_card(CARDS[card][0], sms, CARDS[card][2])
    cut = extension.cuts_for(m, n, k, 64, str(dtype)[6:], CARDS[card][0], sms, CARDS[card][2])[0]
    assert cut["workers"] == 8 and cut["blocks"] >= parts
    case = sizes(m, n, k, dtype, m) | {"bs": 64}
    check_nf4_linear(case)
    check_lora_linear(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("card", ["A100", "RTX-3090"])
@pytest.mark.parametrize(
    "sms,m,n,k",
    [(3, 8, 520, 320), (2, 20, 640, 64), (32, 40, 392, 512), (7, 5, 64, 640)],
    ids=["ends-halfway", "of-one-tile", "half-a-stage-each", "second-half-empty"],
)
def test_half_stages_of_dx(
    extension: ModuleType, card: str, sms: int, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    """Blocks whose share starts or ends in the middle of a stage."""
    extension.set_card(CARDS[card][0], sms, CARDS[card][2])
    cut = extension.cuts_for(m, n, k, 64, str(dtype)[6:], CARDS[card][0], sms, CARDS[card][2])[1]
    assert cut["share"] % 2 == 1 and cut["blocks"] > 1
    case = sizes(m, n, k, dtype, m) | {"bs": 64}
    check_nf4_linear_dx(case)
    check_lora_linear_backward(case)
