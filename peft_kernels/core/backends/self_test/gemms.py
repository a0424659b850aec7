"""Which kernels of NF4 GEMMs are wrong on a card: LinearSmall, LinearTiles, LinearDx, LinearWgmma and those
of experts, compared with plain torch in fp32.

They are tested one by one, in the shapes in which errors hide: several tiles of a block, which pass the ring
of stages more than once; cut-off tiles; odd and even numbers of stages; tiles that blocks share; adapters of
one stage and of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...op import OPS
from ..base import name_of
from ..crossovers import ALL_ROWS, ANY, Card, Rows, forced
from .cases import FP32, NVFP4, Values
from .compare import UNFINISHED, Faults

BLOCKSIZE = 64
WGMMA = Rows(ANY, ANY, ANY, ALL_ROWS, ALL_ROWS)
MMA_SYNC = WGMMA.without_wgmma()
DTYPES = (torch.bfloat16, torch.float16)
ALLOWED = 1 / 16
"""Difference of an element, as a share of the result's RMS: 8 eps of bf16, which weights and low-rank terms
are rounded to, in which errors that are a share of a scale or of a term stand out."""


class Problem(NamedTuple):
    """A linear layer with LoRA, or one of experts. The gradient is tested for the transposed shape."""

    rows: int
    features: int
    terms: int
    is_nested: bool = True
    layout: int = BLOCKSIZE
    rank: int = 16
    is_fp32: bool = False
    """Whether the adapter is fp32: it takes three times the stages."""
    ends: tuple[int, ...] = ()
    """Of the rows of each expert."""


def problems(card: Card) -> list[Problem]:
    """For each number of rows in a tile, several tiles for each multiprocessor, the last of them cut off; and
    tiles that all of them share."""
    per_tile = 128 * card.multiprocessors
    return [
        Problem(5, per_tile - 64, 9 * BLOCKSIZE),
        Problem(12, 3 * per_tile - 64, 3 * BLOCKSIZE),
        Problem(30, per_tile - 64, 4 * BLOCKSIZE, rank=24, is_fp32=True),
        *(Problem(rows, per_tile - 64, 9 * BLOCKSIZE, layout=NVFP4) for rows in (5, 12, 30)),
        Problem(64, 7 * per_tile - 64, 3 * BLOCKSIZE),
        Problem(100, 5 * per_tile - 64, 3 * BLOCKSIZE, rank=24, is_fp32=True),
        Problem(200, 5 * per_tile - 64, 3 * BLOCKSIZE, is_nested=False),
        Problem(64, 192, 40 * BLOCKSIZE, is_nested=False, layout=512),
    ]


EXPERTS_PROBLEMS = (
    Problem(200, 192, 5 * BLOCKSIZE, ends=(0, 3, 70, 200)),
    Problem(400, 192, 5 * BLOCKSIZE, is_nested=False, rank=24, is_fp32=True, ends=(1, 130, 400)),
)
"""Tiles of 64 and 128 rows, that start and end anywhere; an expert without rows."""


def test(library: Any, ops: Any, card: Card, device: torch.device, found: Faults) -> None:
    """Adds to `found` what is wrong with each wrong kernel on a device, by its name.

    Parameters
    ----------
    library
        The compiled library, whose crossovers for the card are changed meanwhile and then removed.
    ops
        Its namespace of torch.ops.
    """
    for way, problem, dtype, is_dx in _cases(card):
        shape = problem.features, problem.terms
        n, k = reversed(shape) if is_dx else shape
        kernel = plan(library, card, way, problem, n, k, dtype)[is_dx]
        is_ours = not kernel.endswith(("pieces", "grouped", "composed"))
        is_another = way is MMA_SYNC or "wgmma" in kernel
        if kernel in found or not (is_ours and is_another):
            continue
        run, expected = gemm(ops, problem, n, k, is_dx, dtype, device)
        found[kernel] = UNFINISHED
        try:
            with forced(library, card, way):
                wrong = _difference(run(), expected)
        except torch.OutOfMemoryError:
            raise  # this says nothing of the kernel
        except RuntimeError as error:  # it could not be launched, or has stopped the device
            found[kernel] = " ".join(str(error).split())
            continue
        del found[kernel]
        if wrong is not None:
            experts = f" of {len(problem.ends)} experts" if problem.ends else ""
            found[kernel] = f"{name_of(dtype)}, {problem.rows} rows{experts}, weight {n}x{k}: {wrong}"


def _cases(card: Card) -> Iterator[tuple[Rows, Problem, torch.dtype, bool]]:
    for problem in (*problems(card), *EXPERTS_PROBLEMS):
        for way in (MMA_SYNC, WGMMA):
            for dtype in DTYPES:
                yield way, problem, dtype, False
                yield way, problem, dtype, True


def plan(
    library: Any, card: Card, way: Rows, problem: Problem, n: int, k: int, dtype: torch.dtype
) -> tuple[str, str]:
    """The kernels that a problem takes by these crossovers, forward and backward: as `library.plan` names
    them, those of experts after "experts_"."""
    rest = n, k, problem.layout, name_of(dtype)
    with forced(library, card, way):
        if not problem.ends:
            forward, backward = library.plan(problem.rows, *rest)
            return forward, backward
        forward, backward = library.experts_plan(problem.rows, len(problem.ends), *rest)
        return f"experts_{forward}", f"experts_dx_{backward}"


def gemm(
    ops: Any, problem: Problem, n: int, k: int, is_dx: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Tensor], Tensor]:
    """A layer's forward with bias, or its gradient of x, on new arguments; and its result in plain torch."""
    rows, ends, draw = problem.rows, problem.ends, Values(device, dtype)
    each, of_adapter = (len(ends),) if ends else (), FP32 if problem.is_fp32 else None
    base = draw.packed(n, k, problem.layout, problem.is_nested, len(ends))
    a = draw.normal(*each, problem.rank, k, scale=k**-0.5, dtype=of_adapter)
    b, bias = draw.normal(*each, n, problem.rank, dtype=of_adapter), draw.normal(*each, n)
    x, h = draw.normal(rows, n if is_dx else k), draw.normal(rows, problem.rank, dtype=FP32)
    of_rows = [draw.whole(ends, torch.int32)] if ends else []
    name, factors = (
        ("experts_lora_linear", (a, b, 1.0)) if ends else ("lora_linear", (a, b, 1.0, 0.0, None, None))
    )
    if is_dx:
        name, wants = f"{name}_backward", (True, False, False)
        args: tuple[Any, ...] = (x, draw.normal(rows, k), h, *of_rows, *base, *factors, *wants)
    else:
        args = (x, *of_rows, *base, bias, *factors)

    def run() -> Tensor:
        # What a kernel leaves unwritten is NaN, not a result of an earlier call in the same memory.
        torch.full((rows, k if is_dx else n), torch.nan, dtype=dtype, device=device)
        result: Tensor = getattr(ops, name)(*args)[0]
        return result

    wide = (t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for t in args)
    return run, OPS[name].plain(*wide)[0]


def _difference(got: Tensor, expected: Tensor) -> str | None:
    worst = float((got.float() - expected).abs().max())
    allowed = ALLOWED * float(expected.pow(2).mean().sqrt())
    if worst <= allowed:  # not if either is NaN
        return None
    return f"differs from plain torch by {worst:.3g}, allowed {allowed:.3g}"
