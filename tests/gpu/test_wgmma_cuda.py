"""The GEMMs for compute capability 9.0 (LinearWgmma), as PTX of sm_90a: results, plans and planted faults."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lora_cases import (
    BEYOND_FP16,
    check_lora_linear,
    check_lora_linear_backward,
    check_nf4_linear,
    check_nf4_linear_dx,
    check_ranks_beyond_fp16,
)
from numbers_policy import short
from skips import require
from test_cuda_paths import FEW, lines_of, sizes

import ptx_backend as ptx
import testing
from peft_kernels.core.backends import crossovers, cuda
from peft_kernels.core.backends.crossovers import Card
from peft_kernels.core.backends.self_test import gemms

H100 = (90, 132, 227 << 10)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def wgmma(extension: ModuleType) -> Iterator[ModuleType]:
    """The tables of all cards have LinearWgmma for any rows. On a small card."""
    extension.set_card(90, FEW, H100[2])
    with crossovers.forced(extension, Card("all", "9.0", 0), gemms.WGMMA):
        yield extension
    crossovers.set_estimates(extension)


def test_nothing_takes_it_before_it_is_checked(extension: ModuleType) -> None:
    """Not with the estimates that a library is loaded with."""
    assert crossovers.estimate(Card("", "9.0", 132)).limits.has_wgmma
    assert not any("wgmma" in name for m in (64, 256, 2048) for name in plan(extension, m, 4096, 4096))


def plan(
    extension: ModuleType,
    m: int,
    n: int,
    k: int,
    bs: int = 64,
    dtype: str = "bfloat16",
    card: tuple[int, ...] = H100,
) -> tuple[str, str]:
    forward, backward = extension.plan_for(m, n, k, bs, dtype, *card)
    return forward, backward


def test_where_plans_take_it(wgmma: ModuleType) -> None:
    taken = {plan(wgmma, m, 14336, 4096) for m in (1, 64, 65, 128, 256, 512, 2048, 8192)}
    assert all("wgmma" in name for names in taken for name in names), taken
    assert plan(wgmma, 64, 4096, 4096) == ("wgmma64", "dx_wgmma64")
    assert plan(wgmma, 8192, 4096, 4096) == ("wgmma256", "dx_wgmma256")
    # Other cards, and what other kernels do not take either.
    for others in (
        *(plan(wgmma, 256, 4096, 4096, card=(c, 132, 227 << 10)) for c in (80, 100, 120)),
        plan(wgmma, 256, 4096, 4096, card=(90, 132, 99 << 10)),
        plan(wgmma, 256, 4096, 4096, dtype="float32"),
        plan(wgmma, 256, 4096, 4096, bs=32),
    ):
        assert not any("wgmma" in name for name in others), others
    assert plan(wgmma, 256, 4097, 4096)[0].startswith("wgmma")
    assert not plan(wgmma, 256, 4097, 4096)[1].startswith("wgmma")  # rows of dY are not 16-byte aligned


SIZES = (
    (1, 136, 128),
    (33, 72, 192),
    (64, 128, 64),
    (65, 33, 128),
    (70, 200, 640),
    (97, 392, 576),
    (130, 264, 320),
    (257, 136, 192),
    (250, 264, 320),
    (300, 520, 256),
)
"""Rows, and features of the result and of x: at the edges of tiles and stages, and past them."""


@pytest.mark.parametrize("sms", [1, FEW, 7])
def test_every_size(wgmma: ModuleType, sms: int) -> None:
    wgmma.set_card(90, sms, H100[2])
    for i, (m, n, k) in enumerate(SIZES, sms):
        dtype = DTYPES[i % 2]
        case = sizes(m, n, k, dtype, i)
        assert wgmma.plan_for(m, n, k, case["bs"], str(dtype)[6:], 90, sms, H100[2])[0].startswith("wgmma")
        check_nf4_linear(case)
        check_nf4_linear_dx(case)
        check_lora_linear(case)
        check_lora_linear_backward(case)


def test_sizes_take_every_kernel(wgmma: ModuleType) -> None:
    taken = {
        name
        for sms in (1, FEW, 7)
        for m, n, k in SIZES
        for name in plan(wgmma, m, n, k, card=(90, sms, H100[2]))
    }
    assert taken >= {f"{dx}wgmma{tokens}" for dx in ("", "dx_") for tokens in (64, 128, 256)}, taken


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_many_ranks(wgmma: ModuleType, dtype: torch.dtype) -> None:
    """Low-rank terms of several stages."""
    for adapter in ("fp32", "same"):
        case = sizes(130, 136, 128, dtype, 1) | {"r": 64, "adapter": adapter, "needs": "xab"}
        check_lora_linear(case)
        check_lora_linear_backward(case)


@pytest.mark.parametrize("large", BEYOND_FP16)
def test_ranks_beyond_fp16(wgmma: ModuleType, large: str) -> None:
    assert all("wgmma" in name for name in plan(wgmma, 130, 128, 192, dtype="float16"))
    check_ranks_beyond_fp16(130, large)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("sms,m,n,k", [(3, 70, 128, 3648), (2, 64, 264, 2496), (2, 128, 300, 6400)])
def test_tiles_that_blocks_share(
    wgmma: ModuleType, sms: int, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    wgmma.set_card(90, sms, H100[2])
    cuts = wgmma.cuts_for(m, n, k, 64, str(dtype)[6:], 90, sms, H100[2], kernels="wgmma")
    assert cuts[0]["workspace_bytes"] > 0
    case = sizes(m, n, k, dtype, m) | {"bs": 64}
    check_nf4_linear(case)
    check_lora_linear(case)
    check_nf4_linear_dx(sizes(m, k, (n + 63) // 64 * 64, dtype, m) | {"bs": 64})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_tiles_that_blocks_share(wgmma: ModuleType, dtype: torch.dtype) -> None:
    """Only long sums are worth sharing tiles of so many rows."""
    m, n, k = 256, 320, 12800
    for direction, (rows, columns) in enumerate([(n, k), (k, n)]):
        args = (m, rows, columns, 64, str(dtype)[6:], 90, FEW, H100[2])
        assert wgmma.plan_for(*args)[direction].endswith("wgmma256")
        assert wgmma.cuts_for(*args, kernels="wgmma")[direction]["workspace_bytes"] > 0
        case = sizes(m, rows, columns, dtype, 1) | {"bs": 64}
        (check_nf4_linear, check_nf4_linear_dx)[direction](case)


LARGE = (70, 4096, 4096), (300, 1032, 4096), (1000, 1032, 640)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", ["cuda", "ptx"])
def test_every_size_on_a_card(name: str, dtype: torch.dtype) -> None:
    """As PTX with some of the sizes, so that the test is known to be right."""
    require(name)
    backend: Any = {"cuda": cuda, "ptx": ptx}[name].BACKEND
    if name == "ptx":
        backend.extension.set_card(90, FEW, H100[2])
    with testing.running_on({"cuda": "cuda_copied"}.get(name, name)), backend.with_kernels(gemms.WGMMA):
        for i, (m, n, k) in enumerate(SIZES[:4] if name == "ptx" else SIZES + LARGE):
            case = sizes(m, n, k, dtype, i)
            if "wgmma" not in backend.extension.plan(m, n, k, case["bs"], str(dtype)[6:])[0]:
                pytest.skip("no card of compute capability 9.0, or a build without LinearWgmma")
            check_nf4_linear(case)
            check_nf4_linear_dx(case)
            check_lora_linear(case)
            check_lora_linear_backward(case)


def three_products(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Of a tile that blocks share, and of dx with 64 and 128 rows a tile."""
    weight, of_dx = testing.nf4_weight(136, 3840, 64, True), testing.nf4_weight(520, 192)
    x, dy = testing.tensor(64, 3840, dtype=dtype), testing.tensor(257, 520, dtype=dtype)
    ops = torch.ops.peft_kernels
    y = ops.nf4_linear(x, *weight._state.op_args, 136, None)
    return [y, *(ops.nf4_linear_dx(dy[:m], *of_dx._state.op_args, 192) for m in (65, 257))]


@pytest.mark.parametrize("seed", range(5))
def test_order_of_threads_changes_no_bit(wgmma: ModuleType, seed: int) -> None:
    """Nor does uninitialised memory: counters are zero again after every call."""
    ptx.BACKEND.check_order(seed, three_products)


@pytest.mark.parametrize("start", [0, 1024, 8192])
def test_where_shared_memory_starts(wgmma: ModuleType, start: int) -> None:
    want = three_products()
    wgmma.set_shared_start(start)
    for got, expected in zip(three_products(), want, strict=True):
        assert torch.equal(got, expected)


def test_a_start_later_than_the_card_says(wgmma: ModuleType) -> None:
    wgmma.set_shared_start(8192 + 16)
    with pytest.raises(RuntimeError, match="trap"):
        three_products()


def test_no_bank_conflicts(wgmma: ModuleType) -> None:
    """Where codes, scales and pairs are read; scales are looked up by their codes."""
    sources = {name: lines_of(f"{name}.cuh") for name in ("linear_wgmma_operands", "hopper", "device")}
    wgmma.reset_bank_counts()
    three_products()
    seen = 0
    for site, (accesses, _, conflicts) in wgmma.bank_counts().items():
        name, line = Path(site.split(":")[0]).stem, int(site.split(":")[1])
        if name in sources:
            seen += accesses
            code = sources[name][line - 1]
            assert conflicts == 0 or "map" in code or "store" in code, f"{conflicts} at {site}: {code}"
    assert seen


# ---- Planted faults -------------------------------------------------------------------------------------

REGISTER = r"%\w+"


def replaced(pattern: str, by: str, count: int = 0) -> Callable[[str], str]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: compiled.sub(by, text, count=count)


A = rf"(wgmma\.mma_async\S+ \{{[^}}]*\}}, \{{)({REGISTER}), ({REGISTER}), ({REGISTER}), ({REGISTER})\}}"
FAULTS = {
    "no-fence": replaced(r"wgmma\.fence\.sync\.aligned;", ""),
    "no-wait-before-registers": replaced(r"wgmma\.wait_group\.sync\.aligned 1;", ""),
    "no-wait-before-sums": replaced(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    "no-commit": replaced(r"wgmma\.commit_group\.sync\.aligned;", ""),
    "rows-of-a-swapped": replaced(A, r"\1\3, \2, \4, \5}"),
    "steps-of-a-swapped": replaced(A, r"\1\4, \5, \2, \3}"),
    "other-parity": replaced(r"(mbarrier\.try_wait\.parity\S+ done, \[[^\]]+\], )(%\w+);", r"\g<1>0;"),
    "no-arrival": replaced(r"^\s*mbarrier\.arrive\.shared::cta\.b64 _, \[%\w+\];", ""),
    "no-fence-after-init": replaced(r"fence\.mbarrier_init\.release\.cluster;", ""),
    "no-bytes-expected": replaced(
        r"mbarrier\.arrive\.expect_tx(\.shared::cta\.b64 _, \[%\w+\]), %\w+;", r"mbarrier.arrive\1;"
    ),
    "box-of-other-columns": replaced(r"(cp\.async\.bulk\.tensor[^\{]*\{)(%\w+), (%\w+)\}", r"\1\3, \2}"),
    "parts-not-awaited": replaced(r"atom\.acq_rel\.gpu", "atom.relaxed.gpu"),
    "no-barrier-of-warpgroups": replaced(r"^\s*bar\.sync 1, 256;", ""),
}


def check_fault(extension: ModuleType, fault: str, products: Callable[[], list[torch.Tensor]]) -> None:
    """Checks that a fault in the kernels' text changes results or is an error."""
    edited = 0

    def edit(text: str) -> str:
        nonlocal edited
        if "wgmma" not in text:
            return text
        changed = FAULTS[fault](text)
        edited += changed != text
        return changed

    want = products()
    extension.set_edit(edit)
    try:
        for seed in range(4):
            extension.set_seed(seed)
            for got, expected in zip(products(), want, strict=True):
                assert torch.equal(got, expected)
    except (RuntimeError, AssertionError):
        found = True
    else:
        found = False
    finally:
        extension.set_edit(None)
        extension.set_seed(1)
    assert edited, "the text has nothing to break"
    assert found


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(wgmma: ModuleType, fault: str) -> None:
    check_fault(wgmma, fault, three_products)


# ---- The self-test of a card ----------------------------------------------------------------------------


SHORT = [gemms.Problem(64, 64, 9 * 64), gemms.Problem(100, 192, 2 * 64, rank=24, is_fp32=True)]
"""Problems of one and of two tiles, that a block computes one after the other."""


def faults_of(extension: ModuleType, sms: int = 1) -> set[str]:
    """The kernels that the self-test of a card finds wrong."""
    found: dict[str, str] = {}
    extension.set_card(90, sms, H100[2])
    ops, card = torch.ops.peft_kernels_ptx, Card("a card", "9.0", sms)
    gemms.test(extension, ops, card, torch.device("cpu"), found)
    assert not any("wgmma" in name for name in extension.plan(64, 4096, 4096, 64, "bfloat16")), "left on"
    return set(found)


def test_the_card_here_passes() -> None:
    require("cuda")
    assert cuda.BACKEND.has_wgmma(0), "see the warning"


@pytest.mark.parametrize("sms", [1, FEW, 78, 114, 132, 144])
def test_every_kernel_is_tested(wgmma: ModuleType, sms: int) -> None:
    card, taken, shared = (90, sms, H100[2]), set(), 0
    for rows, features, terms, *_ in gemms.problems(Card("a card", "9.0", sms)):
        for direction, shape in enumerate([(features, terms), (terms, features)]):
            taken.add(plan(wgmma, rows, *shape, card=card)[direction])
            cuts = wgmma.cuts_for(rows, *shape, 64, "bfloat16", *card, kernels="wgmma")
            shared += cuts[direction]["workspace_bytes"] > 0
    assert taken == {f"{dx}wgmma{tokens}" for dx in ("", "dx_") for tokens in (64, 128, 256)}
    assert shared >= 2 or sms == 1, "no tile is shared by blocks"


# One run need not show a race between blocks. With one tile more, a block passes its ring again.
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"parts-not-awaited"}))
def test_the_self_test_finds_planted_faults(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """And no fault of the kernels for mma.sync."""
    monkeypatch.setattr(gemms, "problems", lambda card: SHORT)
    monkeypatch.setattr(gemms, "EXPERTS_PROBLEMS", ())
    extension.set_edit(lambda text: FAULTS[fault](text) if "wgmma" in text else text)
    try:
        found = faults_of(extension)
    finally:
        extension.set_edit(None)
    assert found and all("wgmma" in name for name in found), found
