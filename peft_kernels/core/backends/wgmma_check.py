"""Checks LinearWgmma on a device before it is used there, by comparing it with the kernels for mma.sync.

Results depend on the card and the compiled library alone, and so does the verdict: processes of a job that
have the same of both agree without asking each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .crossovers import ALL_ROWS, ANY, Card, Rows, forced

BLOCKSIZE = 64
RANK = 16
WGMMA = Rows(ANY, ANY, ANY, ALL_ROWS, ALL_ROWS)
MMA_SYNC = WGMMA.without_wgmma()
ALLOWED = 1 / 16
"""Difference of an element, as a share of the result's RMS. The kernels round scales differently, so right
results differ too."""


class Problem(NamedTuple):
    """A linear layer with LoRA. The gradient is checked for the transposed shape."""

    rows: int
    features: int
    terms: int
    is_nested: bool


def problems(card: Card) -> list[Problem]:
    """For each number of rows in a tile, one tile for each multiprocessor, the last of them cut off; and one
    tile that all of them share."""
    whole = [Problem(m, 128 * card.multiprocessors - 64, 9 * BLOCKSIZE, True) for m in (64, 100, 200)]
    return [*whole, Problem(64, 192, 40 * BLOCKSIZE, False)]


def fault(library: Any, ops: Any, card: Card, device: torch.device, finish: Callable[[], None]) -> str | None:
    """What is wrong with a result of LinearWgmma on a device; None if nothing is, or no GEMM would use it.

    Parameters
    ----------
    library
        The compiled library, whose crossovers for the card are changed meanwhile and then removed.
    ops
        Its namespace of torch.ops.
    finish
        Waits for what was launched; may raise.
    """
    random = torch.Generator(device).manual_seed(0)
    cases = itertools.product(problems(card), (torch.bfloat16, torch.float16), (False, True))
    with torch.no_grad():
        for problem, dtype, is_dx in cases:
            shape = problem.features, problem.terms
            n, k = reversed(shape) if is_dx else shape
            name = str(dtype).removeprefix("torch.")
            with forced(library, card, WGMMA):
                kernel = library.plan(problem.rows, n, k, BLOCKSIZE, name)[is_dx]
            if "wgmma" not in kernel:
                continue
            run = _gemm(ops, problem, n, k, is_dx, dtype, random)
            with forced(library, card, WGMMA):
                got = run()
                finish()
            with forced(library, card, MMA_SYNC):
                expected = run()
                finish()
            if (found := _difference(got, expected)) is not None:
                return f"{kernel} in {name}, {problem.rows} rows, weight {n}x{k}: {found}"
    return None


def _gemm(
    ops: Any, problem: Problem, n: int, k: int, is_dx: bool, dtype: torch.dtype, random: torch.Generator
) -> Callable[[], Tensor]:
    """A layer's forward with bias, or its gradient of x, on new arguments."""

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=random, dtype=dtype, device=random.device) * scale

    def integers(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=random, dtype=torch.uint8, device=random.device)

    blocks, codes = n * k // BLOCKSIZE, integers(n * k // 2)
    scales: tuple[Any, ...] = (normal(blocks, dtype=torch.float32).abs() + 0.5, None, None)
    if problem.is_nested:
        scales = (
            integers(blocks),
            torch.full((-(-blocks // 256),), 0.5, dtype=torch.float32, device=random.device),
            torch.ones((), dtype=torch.float32, device=random.device),
        )
    base = codes, *scales, BLOCKSIZE
    a, b, bias = normal(RANK, k, scale=k**-0.5), normal(n, RANK), normal(n)
    rest = a, b, 1.0, 0.0, None, None
    x = normal(problem.rows, k)
    dy, h = normal(problem.rows, n), normal(problem.rows, RANK, dtype=torch.float32)

    def run() -> Tensor:
        # What a kernel leaves unwritten is NaN, not a result of an earlier call in the same memory.
        torch.full((problem.rows, k if is_dx else n), torch.nan, dtype=dtype, device=random.device)
        if is_dx:
            return ops.lora_linear_backward(dy, x, h, *base, *rest, True, False, False)[0]
        return ops.lora_linear(x, *base, bias, *rest)[0]

    return run


def _difference(got: Tensor, expected: Tensor) -> str | None:
    got, expected = got.float(), expected.float()
    worst = float((got - expected).abs().max())
    allowed = ALLOWED * float(expected.pow(2).mean().sqrt())
    if worst <= allowed:  # not if either is NaN
        return None
    return f"differs from the kernel for mma.sync by {worst:.3g}, allowed {allowed:.3g}"
