"""Calls of multi_bottleneck and its backward, judged against the reference in fp64."""

from __future__ import annotations

from typing import Any

import torch
from gradient_cases import ACTIVATIONS
from lora_cases import UNSCALED
from numbers_policy import in_range
from torch import Tensor

import testing

GROUPS = ("mixed", "texts", "one", "none", "last")
"""How rows are spread over adapters: `row_group` below."""
SEED = 77


def row_group(kind: str, m: int, adapters: int) -> Tensor:
    """The adapter of each row. Negative numbers and those from `adapters` on mean none."""
    if kind == "mixed":
        generator = torch.Generator().manual_seed(m + testing.SEED)
        drawn = torch.randint(-1, adapters + 1, (m,), generator=generator)
        return drawn.masked_fill_(drawn == adapters, 1 << 40)
    if kind == "texts":  # of 11 rows, the first without an adapter
        return torch.arange(m) // 11 % (adapters + 1) - 1
    return torch.full((m,), {"one": 0, "none": -1, "last": adapters - 1}[kind])


def case_of(**given: Any) -> dict[str, Any]:
    case = {"groups": "mixed", "beside": False, "biases": True, "dtype": torch.bfloat16, "m": 150, "k": 40}
    return case | {"parameters": "fp32", "p": 0.3, "ranks": (5, 12, 8)} | given


def arguments(case: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Of both ops. z has NaN where backward must not read it."""
    m, k, dtype, ranks = case["m"], case["k"], case["dtype"], case["ranks"]
    n, count = k + 8 if case["beside"] else k, len(ranks)
    kept = dtype if case["parameters"] == "same" else torch.float32

    def each(make: Any) -> list[Any]:
        return [make(r, 10 * i) for i, r in enumerate(ranks)]

    of_down, of_up, of_scaling = case.get("large", UNSCALED)

    def vectors(size: int | None, seed: int, factor: float) -> list[Any]:
        if not case["biases"]:
            return [None] * count
        return each(lambda r, i: factor * testing.tensor(size or r, dtype=kept, seed=i + seed))

    x = testing.tensor(1, m, k, dtype=dtype, seed=1, scale=2.0)
    residual = testing.tensor(1, m, n, dtype=dtype, seed=2) if case["beside"] else None
    groups = row_group(case["groups"], m, count)
    down = each(lambda r, i: of_down * testing.tensor(r, k, dtype=kept, seed=i + 3, scale=k**-0.5))
    up = each(lambda r, i: of_up * testing.tensor(n, r, dtype=kept, seed=i + 4, scale=r**-0.5))
    kinds = [ACTIVATIONS[i % len(ACTIVATIONS)] for i in range(count)]
    scaling = [(0.5 + i) * of_scaling for i in range(count)]
    # One adapter in three without dropout, if there are as many.
    p = [0.0 if i % 3 == 2 else case["p"] for i in range(count)]
    seeds = [torch.tensor(SEED + i) if p[i] else None for i in range(count)]
    norms = [None] * count, [None] * count, [1e-5] * count
    rest = kinds, scaling, p, seeds
    dy = testing.tensor(1, m, n, dtype=dtype, seed=5)
    z = of_down * testing.tensor(1, m, max(ranks, default=0), seed=6)
    for i in range(-1, count):
        mine = groups == i if i >= 0 else (groups < 0) | (groups >= count)
        z[0, mine, ranks[i] if i >= 0 else 0 :] = torch.nan
    needs = [True] * count
    biases = vectors(None, 7, min(of_down, 1.0)), vectors(n, 8, 1 / of_scaling)
    return {
        "multi_bottleneck": (x, residual, groups, *norms, down, biases[0], up, biases[1], *rest),
        "multi_bottleneck_backward": (
            dy, x, z, groups, *norms, down, up, *rest, not case["beside"], True,
            [False] * count, needs, needs, needs, needs,
        ),
    }  # fmt: skip


NAMES = ("y", "z"), ("dx", "dnorm_weight", "dnorm_bias", "ddown", "ddown_bias", "dup", "dup_bias")


def called(op: Any, args: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """An op's results by name: a list of one, or one per adapter."""
    found = op(*args)
    names = NAMES[len(found) != 2]
    return {name: one if isinstance(one, list) else [one] for name, one in zip(names, found, strict=True)}


def widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(widened, value))
    return testing.widen(value)


def judge(case: dict[str, Any], ops: Any = torch.ops.peft_kernels, by_value: bool = False) -> None:
    """By the numbers policy. Adapters without rows have gradients of exact
    zeros, and rows without an adapter keep the bits of their residual. `by_value`: errors of great values are
    relative to these, where adapters have a row or two, and the greatest value's rounding would decide.
    Gradients of fp16 parameters are left out where `large` makes them too large for fp16."""
    for name, args in arguments(case).items():
        for result, (got, plain, truth) in _compared(name, args, ops).items():
            if "large" in case and result[0] == "d" and result != "dx" and not in_range(truth, got.dtype):
                continue
            if by_value:
                scale = truth.abs().clamp(min=truth.square().mean().sqrt()).log2().floor().exp2()  # exact
                got, plain, truth = (each / scale.to(each.dtype) for each in (got, plain, truth))
            testing.assert_close(got, plain, truth, result)


def _compared(name: str, args: tuple[Any, ...], ops: Any) -> dict[str, tuple[Tensor, ...]]:
    """By result: the op's, plain torch's and the truth, each flat."""
    reference = testing.reference_op(name)
    ways = (getattr(ops, name), args), (reference, args), (reference, widened(args))
    got, plain, truth = (called(*way) for way in ways)
    found = {}
    for result, of_kernel in got.items():
        columns: list[list[Tensor]] = [[], [], []]
        for one, expected, true in zip(of_kernel, plain[result], truth[result], strict=True):
            assert one.shape == expected.shape and one.dtype == expected.dtype, result
            assert one.is_contiguous(), result
            if not true.any():
                assert not one.any(), result
                continue
            for column, value in zip(columns, (one, expected, true), strict=True):
                column.append(value.reshape(-1))
        found[result] = tuple(torch.cat(column or [torch.empty(0)]) for column in columns)
    return found
