"""Checks LinearWgmma and ExpertsWgmma on a device before they are used there, by comparing them with the
kernels for mma.sync.

Results depend on the card and the compiled library alone, and so does the verdict: processes of a job that
have the same of both agree without asking each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
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
    """A linear layer with LoRA, or one of experts. The gradient is checked for the transposed shape."""

    rows: int
    features: int
    terms: int
    is_nested: bool
    ends: tuple[int, ...] = ()
    """Of the rows of each expert."""


def problems(card: Card) -> list[Problem]:
    """For each number of rows in a tile, one tile for each multiprocessor, the last of them cut off; and one
    tile that all of them share."""
    whole = [Problem(m, 128 * card.multiprocessors - 64, 9 * BLOCKSIZE, True) for m in (64, 100, 200)]
    return [*whole, Problem(64, 192, 40 * BLOCKSIZE, False)]


EXPERTS_PROBLEMS = (
    Problem(200, 192, 5 * BLOCKSIZE, True, (0, 3, 70, 200)),
    Problem(400, 192, 5 * BLOCKSIZE, False, (1, 130, 400)),
)
"""Tiles of 64 and 128 rows, that start and end anywhere; an expert without rows."""


def fault(library: Any, ops: Any, card: Card, device: torch.device, finish: Callable[[], None]) -> str | None:
    """What is wrong with a result of LinearWgmma or ExpertsWgmma on a device; None if nothing is, or no GEMM
    would use them.

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
    all_problems = (*problems(card), *EXPERTS_PROBLEMS)
    cases = itertools.product(all_problems, (torch.bfloat16, torch.float16), (False, True))
    with torch.no_grad():
        for problem, dtype, is_dx in cases:
            shape = problem.features, problem.terms
            n, k = reversed(shape) if is_dx else shape
            name = str(dtype).removeprefix("torch.")
            with forced(library, card, WGMMA):
                kernel = _plans(library, problem, n, k, name)[is_dx]
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
                experts = f" of {len(problem.ends)} experts" if problem.ends else ""
                return f"{kernel} in {name}, {problem.rows} rows{experts}, weight {n}x{k}: {found}"
    return None


def _plans(library: Any, problem: Problem, n: int, k: int, dtype: str) -> tuple[str, str]:
    plan, rows = library.plan, [problem.rows]
    if problem.ends:
        plan, rows = library.experts_plan, [problem.rows, len(problem.ends)]
    forward, backward = plan(*rows, n, k, BLOCKSIZE, dtype)
    return forward, backward


def _gemm(
    ops: Any, problem: Problem, n: int, k: int, is_dx: bool, dtype: torch.dtype, random: torch.Generator
) -> Callable[[], Tensor]:
    """A layer's forward with bias, or its gradient of x, on new arguments."""
    rows, ends = problem.rows, problem.ends
    experts = (len(ends),) if ends else ()
    base = _base(n * k, len(ends) or 1, problem.is_nested, random)
    normal = partial(_normal, random, dtype)
    a, b, bias = normal(*experts, RANK, k, scale=k**-0.5), normal(*experts, n, RANK), normal(*experts, n)
    x, dy, h = normal(rows, k), normal(rows, n), normal(rows, RANK).float()
    op, of_rows = "lora_linear", []
    factors: tuple[Any, ...] = a, b, 1.0, 0.0, None, None
    if ends:
        op, of_rows = "experts_lora_linear", [torch.tensor(ends, dtype=torch.int32, device=random.device)]
        factors = a, b, 1.0

    def run() -> Tensor:
        _spoil_memory(rows, k if is_dx else n, dtype, random.device)
        if is_dx:
            backward = getattr(ops, f"{op}_backward")
            return backward(dy, x, h, *of_rows, *base, *factors, True, False, False)[0]
        return getattr(ops, op)(x, *of_rows, *base, bias, *factors)[0]

    return run


def _normal(random: torch.Generator, dtype: torch.dtype, *size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=random, dtype=dtype, device=random.device) * scale


def _base(elements: int, experts: int, is_nested: bool, random: torch.Generator) -> tuple[Any, ...]:
    """NF4 weights of so many elements, with different scales."""

    def integers(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=random, dtype=torch.uint8, device=random.device)

    blocks, codes = elements // BLOCKSIZE, integers(experts * elements // 2)
    if not is_nested:
        scales = _normal(random, torch.float32, experts * blocks).abs() + 0.5
        return codes, scales, None, None, BLOCKSIZE
    absmax2 = torch.full((experts * -(-blocks // 256),), 0.5, dtype=torch.float32, device=random.device)
    offsets = torch.arange(1, experts + 1, dtype=torch.float32, device=random.device)
    return codes, integers(experts * blocks), absmax2, offsets if experts > 1 else offsets[0], BLOCKSIZE


def _spoil_memory(rows: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
    """What a kernel leaves unwritten is NaN, not a result of an earlier call in the same memory."""
    torch.full((rows, features), torch.nan, dtype=dtype, device=device)


def _difference(got: Tensor, expected: Tensor) -> str | None:
    got, expected = got.float(), expected.float()
    worst = float((got - expected).abs().max())
    allowed = ALLOWED * float(expected.pow(2).mean().sqrt())
    if worst <= allowed:  # not if either is NaN
        return None
    return f"differs from the kernel for mma.sync by {worst:.3g}, allowed {allowed:.3g}"
