"""Case names, inputs and the two checks of each result, shared by the tests of the ops.

The numbers policy (`rounding`), and, since the reference is plain torch itself: every element within the
rounding error of its own sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from rounding import assert_within_rounding
from torch import Tensor

import testing
from peft_kernels.core import dispatch
from peft_kernels.core.backends import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = (1, 7, 33, 96, 100, 576)
NAMED = ("adapter", "adapters", "bias", "groups", "needs", "p")  # axes whose values need the name


def short(value: Any) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(value, str(value))


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def case_id(case: dict[str, Any]) -> str:
    def part(name: str, value: Any) -> str:
        if isinstance(value, bool):
            return name if value else f"not_{name}"
        if isinstance(value, int):
            return f"{name}{value}"
        if isinstance(value, tuple):
            return "-".join(map(str, value)) or f"no_{name}"
        return f"{name}_{value}" if name in NAMED else short(value)

    return "-".join(part(name, value) for name, value in case.items())


def pairs(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by few cases in which any two values of any two axes meet."""
    cases = testing.pairwise(**axes)
    return pytest.mark.parametrize(
        list(axes), [tuple(case.values()) for case in cases], ids=[case_id(case) for case in cases]
    )


def bias_of(case: dict[str, Any], kind: str, features: int) -> Tensor | None:
    if kind == "none":
        return None
    return testing.tensor(
        features, dtype=torch.float32 if kind == "fp32" else case["dtype"], seed=5, scale=0.1
    )


def dense64(weight: Any) -> Tensor:
    """The exact weight that the packed bytes define, by the reference."""
    with dispatch.use_backend("reference"):
        return weight.dequantize(torch.float32).double()


@dataclass
class Result:
    got: Tensor
    plain: Tensor  # from plain torch at that precision
    truth: Tensor  # fp64
    magnitude: Tensor  # the same sums over absolute values

    def check(self, depth: int, what: str) -> None:
        testing.assert_close(self.got, self.plain, self.truth, what)
        assert_within_rounding(self.got, self.truth, self.magnitude, depth, what)


def assert_in_range(results: dict[str, Tensor], case: Any, depth: int) -> None:
    """Results with a large factor are right where the terms of their sum do not exceed their dtype."""
    for name, got in results.items():
        fits = case.magnitude[name] < torch.finfo(got.dtype).max
        assert fits.any() or name[:2] in ("da", "db"), f"{name}: nothing is in range"
        truth, magnitude = (values[name][fits] for values in (case.truth, case.magnitude))
        assert_within_rounding(got[fits], truth, magnitude, depth, name)


def in_range(truth: Tensor, dtype: torch.dtype) -> bool:
    return not truth.numel() or bool(truth.abs().max() < torch.finfo(dtype).max)


def transposed(t: Tensor) -> Tensor:
    """The same values, with memory in another order."""
    return t.t().contiguous().t()


def at_odd_address(t: Tensor) -> Tensor:
    """The same values, contiguous, one element after an aligned address."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def check_odd_addresses(
    backend: str, call: Callable[..., Iterable[Tensor]], args: tuple[Tensor, ...]
) -> None:
    """Bit-equal results with each argument contiguous, but at an unaligned address."""
    want = call(*args)
    for moved in range(len(args)):
        got = call(*(at_odd_address(arg) if i == moved else arg for i, arg in enumerate(args)))
        for a, b in zip(got, want, strict=True):
            if backend == "reference":  # torch may round vectors differently
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)


def same_with_any_threads(run: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """Results of `run`, asserted bit-equal with one, two and five threads, and with the CPU back end's own
    threads for a busy machine."""
    before, found = torch.get_num_threads(), []
    set_busy = cpu.BACKEND.extension.set_busy if testing.unavailable("cpu") is None else lambda busy: None
    try:
        # Under ThreadSanitizer four threads of ours are used in any case; it reports torch's as races.
        several = (1, 1) if testing.sanitizer() == "thread" else (2, 5)
        for threads, busy in ((1, False), *((number, False) for number in several), (several[-1], True)):
            torch.set_num_threads(threads)
            set_busy(busy)
            found.append(list(run()))
    finally:
        torch.set_num_threads(before)
        set_busy(False)
        set_busy(None)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)
    return found[0]


Built = TypeVar("Built")


def once(build: Callable[[dict[str, Any]], Built]) -> Callable[[dict[str, Any]], Built]:
    """Caches `build(case)` for each SEED, so that every back end is compared with the same values. Large
    results are not cached."""
    built: dict[Any, Built] = {}

    def get(case: dict[str, Any]) -> Built:
        key = (tuple(case.items()), testing.SEED)
        if key in built:
            return built[key]
        value = build(case)
        if (case["m"] + case["n"]) * case["k"] < 2**19:
            built[key] = value
        return value

    return get


def check(results: dict[str, Result], depth: int) -> None:
    for name, result in results.items():
        assert result.got.shape == result.truth.shape, name
        result.check(depth, name)
