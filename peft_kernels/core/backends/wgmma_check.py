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


class ExpertsProblem(NamedTuple):
    """A layer of experts with LoRA, likewise."""

    ends: tuple[int, ...]
    features: int
    terms: int
    is_nested: bool

    @property
    def rows(self) -> int:
        return self.ends[-1]


EXPERTS_PROBLEMS = (
    ExpertsProblem((0, 3, 70, 200), 192, 5 * BLOCKSIZE, True),
    ExpertsProblem((1, 130, 400), 192, 5 * BLOCKSIZE, False),
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
    all_problems: list[Problem | ExpertsProblem] = [*problems(card), *EXPERTS_PROBLEMS]
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
            rest = n, k, is_dx, dtype, random
            if isinstance(problem, Problem):
                run = _gemm(ops, problem, *rest)
            else:
                run = _experts_gemm(ops, problem, *rest)
            with forced(library, card, WGMMA):
                got = run()
                finish()
            with forced(library, card, MMA_SYNC):
                expected = run()
                finish()
            if (found := _difference(got, expected)) is not None:
                experts = f" of {len(problem.ends)} experts" if isinstance(problem, ExpertsProblem) else ""
                return f"{kernel} in {name}, {problem.rows} rows{experts}, weight {n}x{k}: {found}"
    return None


def _plans(library: Any, problem: Problem | ExpertsProblem, n: int, k: int, dtype: str) -> tuple[str, str]:
    rest = n, k, BLOCKSIZE, dtype
    plans: tuple[str, str]
    if isinstance(problem, Problem):
        plans = library.plan(problem.rows, *rest)
    else:
        plans = library.experts_plan(problem.rows, len(problem.ends), *rest)
    return plans


def _gemm(
    ops: Any, problem: Problem, n: int, k: int, is_dx: bool, dtype: torch.dtype, random: torch.Generator
) -> Callable[[], Tensor]:
    """A layer's forward with bias, or its gradient of x, on new arguments."""
    base = _base(n * k, 1, problem.is_nested, random)
    normal = partial(_normal, random, dtype)
    a, b, bias = normal(RANK, k, scale=k**-0.5), normal(n, RANK), normal(n)
    rest = a, b, 1.0, 0.0, None, None
    x = normal(problem.rows, k)
    dy, h = normal(problem.rows, n), normal(problem.rows, RANK).float()

    def run() -> Tensor:
        _spoil_memory(problem.rows, k if is_dx else n, dtype, random.device)
        if is_dx:
            return ops.lora_linear_backward(dy, x, h, *base, *rest, True, False, False)[0]
        return ops.lora_linear(x, *base, bias, *rest)[0]

    return run


def _experts_gemm(
    ops: Any,
    problem: ExpertsProblem,
    n: int,
    k: int,
    is_dx: bool,
    dtype: torch.dtype,
    random: torch.Generator,
) -> Callable[[], Tensor]:
    experts, rows = len(problem.ends), problem.rows
    base = _base(n * k, experts, problem.is_nested, random)
    normal = partial(_normal, random, dtype)
    a, b, bias = normal(experts, RANK, k, scale=k**-0.5), normal(experts, n, RANK), normal(experts, n)
    ends = torch.tensor(problem.ends, dtype=torch.int32, device=random.device)
    x, dy, h = normal(rows, k), normal(rows, n), normal(rows, RANK).float()

    def run() -> Tensor:
        _spoil_memory(rows, k if is_dx else n, dtype, random.device)
        if is_dx:
            rest = a, b, 1.0, True, False, False
            return ops.experts_lora_linear_backward(dy, x, h, ends, *base, *rest)[0]
        return ops.experts_lora_linear(x, ends, *base, bias, a, b, 1.0)[0]

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
