"""Split-K in Triton: the last program adds the partial sums and lowers the flags."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from skips import on_triton

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from bench.gpu.triton_calls import BF16, Call, empty, nf4
from peft_kernels.triton_kernels.core import gemm, launch
from peft_kernels.triton_kernels.core.gemm import (
    MAX_SPLITS,
    Partials,
    add_dot,
    dot,
    new_partials,
    reduce_splits,
    split_k,
    sync_stores,
)
from ptx import triton_driver

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="for Triton's interpreter (make triton)")
compiled = pytest.mark.skipif(
    launch.INTERPRETED or triton_driver.wanted() is not None,
    reason="Triton interprets its kernels in this process, or compiles them to PTX alone",
)

ROWS, COLS = 16, 32


@triton.jit
def splits_kernel(x, out, parts, splits, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    first = tl.program_id(0) // splits * splits
    split = tl.program_id(0) - first
    acc = tl.load(x + tl.program_id(0) * ROWS * COLS + at)
    total, last = reduce_splits(acc, parts, first, split, splits)
    tl.store(out + tl.program_id(0) // splits * ROWS * COLS + at, total, mask=(at >= 0) & last)


def run(x: torch.Tensor, parts: Partials | None) -> torch.Tensor:
    """x [tiles, splits, rows, cols] summed over splits."""
    tiles, splits = x.shape[:2]
    out = torch.full((tiles, ROWS, COLS), float("nan"))
    splits_kernel[(tiles * splits,)](x, out, parts, splits, ROWS, COLS)
    return out


def in_order(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x[:, 0])
    for part in x.unbind(1):
        total = total + part
    return total


@interpreted
@pytest.mark.parametrize("splits", (1, 2, 7, MAX_SPLITS.value))
def test_the_same_launch_again(splits: int) -> None:
    """As in a CUDA graph: with the same number, memory and memory contents."""
    parts = new_partials(3 * splits, ROWS * COLS, torch.device("cpu"))
    for round in range(3):
        if round != 1:
            parts.flags.random_()
        x = torch.randn(3, splits, ROWS, COLS)
        assert torch.equal(run(x, parts), in_order(x))
        assert not parts.flags.any()


@interpreted
def test_without_splits() -> None:
    x = torch.randn(3, 1, ROWS, COLS)
    assert torch.equal(run(x, None), x[:, 0])


def test_launch_numbers_are_unique_and_compile_alike() -> None:
    numbers = [new_partials(1, 4, torch.device("cpu")).number for _ in range(1000)]
    assert len(set(numbers)) == 1000
    assert all(number % 2 and 2**61 <= number < 2**63 for number in numbers)


@pytest.mark.parametrize("depth", (0, 1, 64, 500, 513, 14336, 10**7))
@pytest.mark.parametrize("programs", (1, 7, 1000))
def test_splits_cover_the_sum(depth: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: 304)
    units, splits = split_k(programs, depth, 64, torch.device("cpu"))
    assert (
        1 <= splits <= MAX_SPLITS.value and (splits - 1) * units * 64 < max(depth, 1) <= splits * units * 64
    )


@triton.jit
def exchange_kernel(x, between, flag, out, SIZE: tl.constexpr, SEEN: tl.constexpr):
    """Threads read values that other threads of the program have stored."""
    first = tl.program_id(0) * SIZE
    at = tl.arange(0, SIZE)
    tl.store(between + first + at, tl.load(x + first + at))
    if SEEN:
        sync_stores(flag)
    tl.store(out + first + at, tl.load(between + first + SIZE - 1 - at))


@on_triton
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_threads_see_stores_of_others(dtype: torch.dtype) -> None:
    x, flag = torch.randn(3, 512), torch.tensor([7, 8], dtype=dtype)
    between, out = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    exchange_kernel[(3,)](x, between, flag, out, 512, True)
    assert torch.equal(out, x.flip(1)) and flag.tolist() == [7, 8]
    if not launch.INTERPRETED:
        with pytest.raises(RuntimeError, match=r"race: (reads|writes) global memory"):
            exchange_kernel[(3,)](x, between, flag, out, 512, False)


def made_for(target: str) -> Any:
    from bench.gpu import triton_code

    if reason := triton_code.unsupported(target):
        pytest.skip(reason)
    x = torch.empty(1, device="meta")
    parts = new_partials(16, ROWS * COLS, torch.device("meta"))
    with triton_code.compiling_for(target):
        return splits_kernel.warmup(x, x, parts, 8, ROWS, COLS, grid=(1,), num_warps=4)


def before_the_flag(listing: list[str], store: str, flag: str) -> list[str]:
    """The code from the last store of a partial sum to the raising of the flag."""
    end = next(i for i, line in enumerate(listing) if re.search(flag, line))
    begin = max(i for i, line in enumerate(listing[:end]) if re.search(store, line))
    return listing[begin:end]


@compiled
@pytest.mark.parametrize("target", ("sm80", "sm90", "sm120"))
def test_flag_is_raised_after_all_stores(target: str) -> None:
    listing = made_for(target).asm["ptx"].splitlines()
    between = before_the_flag(listing, r"st\.global", r"atom\.global\.gpu\.acq_rel\.exch\.b64")
    assert any("bar.sync" in line for line in between)
    assert any("atom.global.gpu.acq_rel.or.b64" in line for line in listing)


GLOBAL_STORE = r"\b(buffer|global)_store_"
WAITS = r"s_waitcnt vmcnt\(0\)|s_waitcnt_vscnt null, 0x0|s_wait_storecnt 0x0"


@compiled
@pytest.mark.parametrize("target", ("gfx942", "gfx950", "gfx1100", "gfx1200"))
def test_waves_wait_for_their_stores_before_the_barrier(target: str) -> None:
    """On AMD cards a barrier waits only for shared memory."""
    listing = made_for(target).asm["amdgcn"].splitlines()
    between = before_the_flag(listing, GLOBAL_STORE, r"_atomic_swap_(x2|b64)")
    barrier = next(i for i, line in enumerate(between) if "s_barrier" in line)
    assert any(re.search(WAITS, line) for line in between[:barrier])


@compiled
@pytest.mark.parametrize("target", ("gfx942", "gfx950", "gfx1100", "gfx1200"))
def test_waves_invalidate_their_caches_after_the_barrier(target: str) -> None:
    from bench.gpu import triton_code

    if reason := triton_code.unsupported(target):
        pytest.skip(reason)
    x, flag = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    with triton_code.compiling_for(target):
        made = exchange_kernel.warmup(x, x, flag, x, 512, True, grid=(1,), num_warps=4)
    listing = made.asm["amdgcn"].splitlines()
    barrier = next(i for i, line in enumerate(listing) if "s_barrier" in line)
    assert any(re.search(WAITS, line) for line in before_the_flag(listing, GLOBAL_STORE, "s_barrier"))
    load = next(i for i in range(barrier, len(listing)) if re.search(r"\b(buffer|global)_load_", listing[i]))
    assert any(re.search(r"buffer_(gl0_)?inv|global_inv", line) for line in listing[barrier:load])


@triton.jit
def chain_kernel(a, b, out, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(4):
        part = dot(tl.load(a + at), tl.load(b + at), tl.float32)
        acc = acc + part if CHAIN else add_dot(acc, part)
        a += BLOCK * BLOCK
    tl.store(out + at, acc)


@compiled
def test_partial_sums_are_not_fused() -> None:
    """The compiler fuses an addition into `tl.dot`, as triton_sums.py models it."""
    from bench.gpu import triton_code

    half, out = torch.empty(1, dtype=BF16, device="meta"), torch.empty(1, device="meta")
    for chain in (True, False):
        with triton_code.compiling_for("sm80"):
            made = chain_kernel.warmup(half, half, out, BLOCK=16, CHAIN=chain, grid=(1,))
        (added_to,) = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", made.asm["ttir"])
        assert added_to.startswith("%acc" if chain else "%cst")


def lora(m: int, n: int, k: int) -> Iterator[Call]:
    """A layer with an adapter of rank 16, forward and backward, as a patched PEFT layer calls it."""
    x, dy, h, a, b = (
        empty(m, k, dtype=BF16),
        empty(m, n, dtype=BF16),
        empty(m, 16),
        empty(16, k),
        empty(n, 16),
    )
    yield Call("lora_linear", (x, *nf4(n, k), None, a, b, 2.0, 0.0, None, None))
    yield Call("lora_linear_backward", (dy, x, h, *nf4(n, k), a, b, 2.0, 0.0, None, None, True, True, True))


def llama_layer(m: int) -> Iterator[Call]:
    """The seven projections of Llama-3.1-8B; gate and up as the fused MLP calls them."""
    width, key, inner = 4096, 1024, 14336
    for n, k in ((width, width), (key, width), (key, width), (width, width), (width, inner)):
        yield from lora(m, n, k)
    x, gate, h = empty(m, width, dtype=BF16), empty(m, inner, dtype=BF16), empty(m, 32)
    bases = [[part, part] for part in nf4(inner, width)]
    rest = (
        [empty(16, width)] * 2,
        [empty(inner, 16)] * 2,
        [0, 1],
        [2.0] * 2,
        [0.0] * 2,
        None,
        [0, 0],
        None,
        None,
    )
    yield Call("multi_lora_linear", (x, *bases, [inner, inner], [empty(0)] * 2, *rest))
    for _ in range(2):  # the GEMM is repeated in backward
        yield Call("gated_activation", (gate, gate, "silu"))
    yield Call("gated_activation_backward", (gate, gate, gate, "silu"))
    needs = True, [True] * 2, [True] * 2
    yield Call("multi_lora_linear_backward", ([gate, gate], x, h, *bases, *rest, *needs))


@compiled
@pytest.mark.parametrize("processors", (2, 132))
def test_launches_of_a_transformer_layer(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-8B at 2048 rows, forward and backward: 48, and 14 GEMMs of torch."""
    from bench.gpu import triton_code

    monkeypatch.setattr(gemm, "multiprocessors", lambda device: processors)
    counted = Counter(item.kernel.__name__ for item in triton_code.launches("sm90", llama_layer(2048)))
    assert counted == {
        "piece_kernel": 14,
        "shrink_kernel": 12,
        "expand_kernel": 13,
        "over_rows_kernel": 6,
        "gated_kernel": 2,
        "gated_backward_kernel": 1,
    }


@compiled
def test_launches_of_a_decoded_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for h, one for the GEMM with its delta; split-K adds none."""
    from bench.gpu import triton_code

    monkeypatch.setattr(gemm, "multiprocessors", lambda device: 132)
    forward = next(lora(1, 4096, 4096))
    found = triton_code.launches("sm90", [forward])
    assert [item.kernel.__name__ for item in found] == ["shrink_kernel", "linear_kernel"]
    assert all(any(isinstance(arg, Partials) for arg in item.args) for item in found)
