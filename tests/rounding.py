"""The numbers policy: which errors are rounding. docs/testing.md explains it.

The reference in fp64 is the truth, and plain torch at the kernel's precision shows how large rounding errors
are. No bound contains the largest of some random errors, which another CPU, thread count or seed would draw
anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RUNS = 8, 64
"""Over how many inputs a test is judged whose first ones fail; the second number, if it still fails."""
HOPELESS = 4.0
"""Times what is allowed: no number of inputs would help."""
FALSE_ALARM = 1e-9
"""Probability that a check of single elements fails if errors are normally distributed."""

# Where both sides compute the same in fp32 in other orders, no truth judges them, but a bound for their
# relative difference does. Added one after another, d terms of either sign have an RMS error of
# 0.2 sqrt(d) eps of the sum, since each partial sum is rounded by eps / sqrt(12) of itself: 2.3 eps for the
# 128 of these tests, and 3.3 eps = 4e-7 between two orders.
ONE_LAYER = 1e-6
"""Of one product: 2.5 times that."""
ONE_MODEL = 1e-5
"""Of a forward: 20 products in a row, sqrt(20) times that, and 5 more for weights larger than usual."""
ONE_STEP = 1e-4
"""Of a step's gradients, or of losses of a few steps: differences of terms ten times as large."""
FAR = 1e-3
"""Of a step's results from the truth, ten times that: of deeper models, and of a peer that must not widen the
policy."""
CURVE = 1e-3
"""Of the losses of a training run: AdamW divides small gradients, with their errors, by their size."""
BF16 = 0.01
"""Of a loss or of one product in bf16: 1.3 eps."""
BF16_STEP = 0.1
"""Of a step's gradients in 16-bit types: 13 eps of bf16."""


class TooFar(AssertionError):
    """Results are further from the truth than rounding explains, on these inputs."""


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, in fp64; 0 for two empty or equal tensors, inf for anything not finite."""
    if got.shape != truth.shape:
        raise AssertionError(f"expected shape {tuple(truth.shape)}, got {tuple(got.shape)}")
    difference = (got.double() - truth.double()).norm().item()
    if difference == 0.0 or got.numel() == 0:
        return 0.0
    if difference != difference:
        return float("inf")
    return difference / max(truth.double().norm().item(), 1e-300)


def assert_close(
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    what: str = "result",
    *,
    product: torch.dtype | None = None,
    by_element: bool = True,
) -> None:
    """Asserts the numbers policy: `got` from the kernel, `plain` from plain torch at that precision, `truth`
    in fp64. RMS errors are compared, and single elements with the RMS error of their row or column.
    `product`: what a factor of single elements is rounded to, if not to got's dtype. `by_element` False:
    elements share roundings, and are judged by `assert_within_rounding`."""
    eps = torch.finfo(got.dtype).eps
    own = max(eps, torch.finfo(product or got.dtype).eps) if by_element else None
    _judge(Check(what, eps, own), {what: got}, {what: plain}, {what: truth})


def assert_close_together(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor], what: str = "results"
) -> None:
    """The policy for the RMS error of all results of a model, each relative to its size: a deep model can
    turn one rounding into an error of any size in one of them."""
    for name in got.keys() & plain.keys():
        if got[name].dtype != plain[name].dtype:
            raise AssertionError(f"{name}: expected {plain[name].dtype}, got {got[name].dtype}")
    sizes = {name: max(true.double().norm().item(), 1e-6) for name, true in truth.items()}
    scaled = (
        {name: one.double() / sizes[name] for name, one in side.items()} for side in (got, plain, truth)
    )
    _judge(Check(what, torch.finfo(torch.float32).eps), *scaled)


def assert_within_rounding(
    got: Tensor, truth: Tensor, magnitude: Tensor, depth: int, what: str, product: torch.dtype | None = None
) -> None:
    """|got - truth| is within a few roundings, and those of an fp32 sum of `depth` terms, of the sum of
    absolute terms `magnitude`. Needs no plain torch, so the reference too is judged by it.
    Roundings are in got's dtype, and in the base GEMM's dtype `product` if that differs."""
    # Weight, bias, base GEMM and result are rounded to the dtype: half an ulp each.
    infos = [torch.finfo(dtype) for dtype in {got.dtype, product or got.dtype}]
    unit = 2 * sum(info.eps for info in infos) + (4 + depth**0.5) * torch.finfo(torch.float32).eps
    smallest = max(info.smallest_normal for info in infos)
    excess = (got.double() - truth).abs() - unit * magnitude - 2 * smallest
    if got.numel() and not bool((excess <= 0).all()):
        at = int(excess.nan_to_num(float("inf")).argmax())
        raise AssertionError(
            f"{what}: flat element {at}: expected {truth.reshape(-1)[at]}, got {got.reshape(-1)[at]}"
        )


@dataclass
class Check:
    """The errors that one check of a test has seen, over the runs of that test."""

    what: str
    eps: float
    own: float | None = None
    """A rounding of an element that is a single term; None: elements are not judged one by one."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(rows, columns) each: the kernel's errors, plain torch's, and the truth."""

    def add(
        self, got: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> None:
        if not got.keys() == plain.keys() == truth.keys():
            raise AssertionError(f"{self.what}: expected {', '.join(truth)}, got {', '.join(got)}")
        for name, one in got.items():
            if (one.dtype, one.shape) != (plain[name].dtype, truth[name].shape):
                expected = f"{plain[name].dtype} {tuple(truth[name].shape)}"
                raise AssertionError(f"{name}: expected {expected}, got {one.dtype} {tuple(one.shape)}")
            if one.numel():
                true = truth[name].detach().double()
                sides = one.detach().double() - true, plain[name].detach().double() - true, true
                self.parts.append(tuple(t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in sides))  # type: ignore[arg-type]

    def excess(self) -> tuple[float, str]:
        """The largest error by what it may be, at most 1 if all is well, and a message."""
        if not self.parts:
            return 0.0, ""
        got, plain, truth = (torch.cat([t.flatten() for t in side]) for side in zip(*self.parts, strict=True))
        error, allowed = (float(t) for t in (_rms(got), self._allowed(plain, truth, self.eps)))
        found = _ratio(error, allowed), f"{self.what}: RMS error {error:.3g}, allowed {allowed:.3g}"
        if self.own is None or found[0] > 1:
            return found
        # |N(0, 1)| is above z with a probability below exp(-z^2 / 2); there are as many chances as elements.
        z = math.sqrt(2 * math.log(len(got) / FALSE_ALARM))
        for errors, of_torch, true in self.parts:
            lines = [self._allowed(of_torch, true, self.own, dim) for dim in (0, 1)]
            bound = z * torch.maximum(*lines).clamp(min=allowed) + 2 * self.own * true.abs()
            ratios = torch.where(errors == 0, 0.0, errors.abs() / bound).flatten().nan_to_num(math.inf)
            at = int(ratios.argmax())
            off = errors.flatten()[at]
            message = f"{self.what}: flat element {at}: expected {true.flatten()[at]}, off by {off:.3g}"
            found = max(found, (float(ratios[at]), f"{message}, allowed {bound.flatten()[at]:.3g}"))
        return found

    @staticmethod
    def _allowed(of_torch: Tensor, truth: Tensor, eps: float, dim: int | None = None) -> Tensor:
        """RMS error of a whole, or of its lines along a dimension."""
        return 2 * _rms(of_torch, dim) + eps * _rms(truth, dim)


def _rms(values: Tensor, dim: int | None = None) -> Tensor:
    return values.square().mean(dim, keepdim=dim is not None).sqrt()


def _ratio(error: float, allowed: float) -> float:
    return 0.0 if error == 0 else error / allowed if math.isfinite(error) and allowed else math.inf


class _Test:
    """The checks of the test that is running, in the order in which it makes them."""

    def __init__(self) -> None:
        self.checks: dict[tuple[str, int], Check] = {}
        self.seen: Counter[str] = Counter()
        self.runs = 1

    def check(self, new: Check) -> Check:
        self.seen[new.what] += 1
        return self.checks.setdefault((new.what, self.seen[new.what]), new)

    def worst(self) -> tuple[float, str]:
        return max((check.excess() for check in self.checks.values()), default=(0.0, ""))


_test: _Test | None = None


def _judge(
    check: Check, got: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> None:
    """Now, but errors of a test that runs again when all its runs are over."""
    check = _test.check(check) if _test is not None else check
    check.add(got, plain, truth)
    ratio, message = check.excess() if _test is None or _test.runs == 1 else (0.0, "")
    if ratio > 1:
        raise TooFar(message)


def run_number() -> int:
    """0, or which run it is of a test whose first inputs failed."""
    return 0 if _test is None else _test.runs - 1


def judged_over_several_inputs(test: Callable[[int], None]) -> None:
    """Calls test(0). If that is too far from the truth, calls it with 1, 2, ... for other inputs, and judges
    the errors of all of them together: those of few elements, or of elements that share a rounding, say
    little."""
    global _test
    outer, _test = _test, _Test()
    try:
        test(0)
    except TooFar as first:
        for runs in RUNS:
            while _test.runs < runs:
                _test.runs += 1
                _test.seen.clear()
                try:
                    test(_test.runs - 1)
                except Exception as error:
                    raise first from error
            ratio, message = _test.worst()
            if ratio <= 1:
                return
            if ratio > HOPELESS:
                break
        raise AssertionError(f"{message}, over {_test.runs} inputs; the first: {first}") from None
    finally:
        _test = outer
